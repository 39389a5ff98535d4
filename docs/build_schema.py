"""Writes docs/schema.json to stdout: the JSON schema of a pack's manifest, from the structs that read it."""

import json
import sys

import msgspec

from comoe.store.manifest import Manifest


def main() -> None:
    """Print the schema."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(Manifest)}
    json.dump(schema, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
