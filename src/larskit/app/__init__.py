"""Train an image classifier and compare optimizers: what the commands run."""


class InputError(Exception):
    """Invalid user input. The message is one sentence, printed without a traceback."""
