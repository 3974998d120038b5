"""Errors that a user can mend; the command line prints them and exits with code 2."""


class InputError(ValueError):
    """Something the user gave is wrong. The message names the file, the record and the mend."""


class NoTokenizerError(InputError):
    """A record is text, and there is no tokenizer. `Stages.reading` adds whose model it is."""

    def __init__(self, record: str) -> None:
        super().__init__(
            f"record {record!r} is text, but the stage's model has no tokenizer; give input_ids, or a model folder "
            "with a tokenizer"
        )
        self.record = record
