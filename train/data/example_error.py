"""The error of an example that cannot be read."""


class ExampleError(ValueError):
    """An example of a data set that can't be read, or whose bytes have changed since it was indexed.

    name: where a person finds the example, e.g. its path. split: the split it belongs to. example_id: its id in the
    example index. reason: what is wrong. advice: what to do.
    """

    def __init__(self, name: str, *, split: str, example_id: str, reason: str, advice: str):
        super().__init__(f"cannot read {name}: {reason}; {advice}")
        self.name = name
        self.split = split
        self.example_id = example_id
        self.reason = reason
        self.advice = advice
