"""The main job behind the command line: train a classifier, study optimizers."""


class InputError(Exception):
    """What the user gave cannot be used; the message is one sentence for them."""
