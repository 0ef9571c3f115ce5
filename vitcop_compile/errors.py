"""What can go wrong, by whose hand. Every message names the value, the bound and the remedy."""


class VitcopError(ValueError):
    """Base of every error raised on purpose by this package."""


class ConfigError(VitcopError):
    """A configuration that no schedule can meet (budget beyond the tokens, layer out of range, ...)."""


class InputError(VitcopError):
    """A prompt, image or generation argument that the compiled programs cannot take."""


class UnsupportedError(VitcopError):
    """A model, backend or feature that is not supported; the message lists what is."""


class RewriteError(VitcopError):
    """A pass refused a graph; the message says which property of the graph does not hold."""


class VitcopWarning(UserWarning):
    """Category of every warning this package issues."""
