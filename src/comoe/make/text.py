"""From text to windows of tokens: how documents are cut, marked and joined."""

from typing import TYPE_CHECKING

from comoe.types import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

DOCUMENT_TOKEN = "<|doc|>"


def documents(text: str) -> list[str]:
    """The documents of a corpus file, outer newlines stripped, empty ones left out."""
    return [document for part in text.split(DOCUMENT_TOKEN) if (document := part.strip("\n"))]


def windows(tokenizer: "Tokenizer", text: str, length: int, limit: int = 48) -> list[list[int]]:
    """The first `limit` consecutive full windows of `length` tokens; a mark follows each document."""
    mark, ids = document_mark(tokenizer), list[int]()
    for document in documents(text):
        ids += [*token_ids(tokenizer, document), mark]
        if len(ids) >= limit * length:
            break
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:limit]


def document_mark(tokenizer: "Tokenizer") -> int:
    """The token that follows each document: the corpus's own mark, else the end of a sequence."""
    known = tokenizer.convert_tokens_to_ids(DOCUMENT_TOKEN)
    if known is not None and known != getattr(tokenizer, "unk_token_id", None):
        return int(known)
    end = getattr(tokenizer, "eos_token_id", None)
    return special_id(tokenizer, DOCUMENT_TOKEN) if end is None else int(end)


def token_ids(tokenizer: "Tokenizer", text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def special_id(tokenizer: "Tokenizer", token: str) -> int:
    """The token's id. UsageError for a tokeniser that does not know it."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or found == tokenizer.unk_token_id:
        raise UsageError(f"The tokeniser has no token {token}: the evaluation protocol needs it.")
    return int(found)
