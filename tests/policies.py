"""What every eviction policy must do: subclass `PolicyContract` and say how to make one."""

from comoe.memory.policy import Policy
from comoe.types import BlobId


def blob(row: int) -> BlobId:
    return BlobId(0, "part", row)


class PolicyContract:
    def make(self) -> Policy:
        raise NotImplementedError

    def filled(self, count: int) -> Policy:
        policy = self.make()
        for row in range(count):
            policy.inserted(blob(row), 1 + row)
        return policy

    def test_victims_are_exactly_the_blobs_that_are_in(self) -> None:
        policy = self.filled(6)
        policy.removed(blob(2))
        policy.touched(blob(0))
        assert sorted(policy.victims()) == [blob(row) for row in (0, 1, 3, 4, 5)]

    def test_each_victim_is_named_once_however_often_it_was_used(self) -> None:
        policy = self.filled(3)
        for row in (1, 1, 2, 1):
            policy.touched(blob(row))
        assert len(list(policy.victims())) == 3

    def test_a_blob_that_left_may_come_back(self) -> None:
        policy = self.filled(2)
        policy.removed(blob(1))
        policy.inserted(blob(1), 7)
        assert sorted(policy.victims()) == [blob(0), blob(1)]

    def test_an_empty_policy_has_no_victims(self) -> None:
        policy = self.filled(1)
        policy.removed(blob(0))
        assert list(policy.victims()) == []

    def test_a_blob_that_was_used_elsewhere_is_no_victim(self) -> None:
        policy = self.filled(2)
        policy.used_elsewhere(blob(5))
        assert sorted(policy.victims()) == [blob(0), blob(1)]
