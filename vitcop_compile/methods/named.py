"""Methods by name: settings as words of a command line become a method."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal

from ..config import DEFAULT_PRESET, NAMED_PRESETS, PRESETS, Budgets, ViTCoPConfig
from ..errors import ConfigError
from ..schedule import Method
from .base import METHODS
from .calibrated import Calibrated

VITCOP, DENSE = "vitcop", "dense"
# In front of a name: that method, calibrated.
CALIBRATED = "calibrated+"
# Needs a function, which no word can say.
_UNNAMED = "custom"


def method_names() -> tuple[str, ...]:
    """Every name that `method_named` knows, each of which but "dense" can have "calibrated+" in front."""
    return (VITCOP, DENSE, *(name for name in METHODS if name != _UNNAMED))


def fields_of(name: str) -> tuple[str, ...]:
    """The settings of the method `name`. Raises ConfigError for unknown names."""
    if name.startswith(CALIBRATED):
        return fields_of(name.removeprefix(CALIBRATED))
    if name == DENSE:
        return ()
    return tuple(field.name for field in dataclasses.fields(_kind(name)) if field.init)


def method_named(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """The method `name` with `settings`, values or words: "2", "0.1", "1/9", "true", "none", "8:16:24" for several numbers.

    "dense" prunes nothing. "vitcop" with a `retention` that is a preset's name is that preset, with another it has the ratios
    of the nearest one, as with `mean_tokens`; without a target it is the default preset. Other settings replace those.
    "calibrated+NAME" is `Calibrated` of the method NAME with them. Raises ConfigError for unknown names, which lists those
    there are, and for values that are none of their setting's type, or out of range.
    """
    settings = dict(settings or {})
    if name.startswith(CALIBRATED):
        if (inner := name.removeprefix(CALIBRATED)) == DENSE:
            raise ConfigError(f"{name}: nothing is pruned, and nothing counts for several tokens: name another method")
        return Calibrated(method_named(inner, settings))
    if name == DENSE:
        if settings:
            raise ConfigError(f"{DENSE} has no settings, and {', '.join(settings)} was given: leave it out, or name a method")
        return ViTCoPConfig.dense()
    kind = _kind(name)
    known = fields_of(name)
    if unknown := sorted(settings.keys() - set(known)):
        raise ConfigError(f"{name}: unknown settings {', '.join(unknown)}: use some of {', '.join(known)}")
    if name == VITCOP and settings.get("retention") in NAMED_PRESETS and not {"mean_tokens", "budgets"} & settings.keys():
        preset = settings.pop("retention")
        return ViTCoPConfig.preset(preset, **_typed(name, kind, settings))
    values = _typed(name, kind, settings)
    if name != VITCOP:
        return kind(**values)
    if values.get("retention") is not None:
        return settings_of_share(**values)
    if values.get("mean_tokens") is not None:
        return ViTCoPConfig.for_mean_tokens(**values)
    if values.get("budgets") is not None or values.get("prune") is False:
        return ViTCoPConfig(**values)
    return ViTCoPConfig.preset(DEFAULT_PRESET, **values)


def method_from(text: str, **defaults: Any) -> Method:
    """The method of "name" or "name:setting=value,setting=value", as in "fastv:layer=2,tokens=64".

    defaults: settings for those that the text does not give, as far as the method has them, and of targets (tokens, retention,
    ...) only where it gives none. Raises ConfigError as `method_named` does."""
    name, settings = split(text)
    targets = {"tokens", "retention", "mean_tokens", "budgets"}
    given = set(settings) | (targets if targets & settings.keys() else set())
    known = fields_of(name)
    return method_named(name, {k: v for k, v in defaults.items() if k in known and k not in given} | settings)


def split(text: str) -> tuple[str, dict[str, str]]:
    """(name, settings as words) of "name:setting=value,setting=value". Raises ConfigError for another form."""
    name, _, rest = text.partition(":")
    settings: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key or not value or key in settings:
            raise ConfigError(f"{text!r}: {item!r} is not one setting=value: write name:setting=value,setting=value")
        settings[key.strip()] = value.strip()
    return name.strip(), settings


def settings_of_share(retention: float, **others: Any) -> ViTCoPConfig:
    """Settings of ViTCoP that keep a share `retention` of the visual tokens, with the ratios of the nearest preset. Raises
    ConfigError."""
    nearest = min(PRESETS, key=lambda name: abs(PRESETS[name][2] - retention))
    return ViTCoPConfig.preset(nearest, retention=retention, **others)


def settings_from(retention: str, method: str | None = None, *, what: str = "--retention ") -> Method:
    """What the options of a command line say together: `method` as `method_from` reads it, or without one ViTCoP at a
    published setting, such as "1/9", or a share such as "0.2", as in `settings_of_share`. what: names the retention in an
    error. Raises ConfigError."""
    if method is not None:
        return method_from(method, retention=retention)
    if retention in NAMED_PRESETS:
        return ViTCoPConfig.preset(retention)
    try:
        share = float(retention)
    except ValueError:
        raise ConfigError(f"{what}{retention!r} is neither one of {', '.join(NAMED_PRESETS)} nor a number") from None
    return settings_of_share(share)


def _kind(name: str) -> type[Any]:
    if name == VITCOP:
        return ViTCoPConfig
    if name == _UNNAMED:
        raise ConfigError(f"method {name!r} needs a function: pass CustomMethod(score=...) to optimize")
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is unknown: use one of {', '.join(method_names())}")
    return METHODS[name]


def _typed(name: str, kind: type[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {
        key: _value(f"{name}: {key}", value, hints[key]) if isinstance(value, str) else value
        for key, value in settings.items()
    }


def _value(what: str, word: str, kind: Any) -> Any:
    """A word as a value of the type of its setting."""
    options = (
        typing.get_args(kind) if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union else (kind,)
    )
    if types.NoneType in options and word.lower() == "none":
        return None
    option = next(option for option in options if option is not types.NoneType)
    if option is bool:
        if word.lower() not in ("true", "false"):
            raise ConfigError(f"{what}={word!r} is neither true nor false")
        return word.lower() == "true"
    if option is str or typing.get_origin(option) is Literal:
        return word  # which words there are is checked where they are known
    if option is Budgets or typing.get_origin(option) is tuple:
        return tuple(_number(what, part, int) for part in word.split(":"))
    return _number(what, word, option)


def _number(what: str, word: str, kind: type[int] | type[float]) -> int | float:
    try:
        return int(word) if kind is int else float(Fraction(word))
    except (ValueError, ZeroDivisionError, OverflowError):
        wanted = "an integer" if kind is int else "a number, such as 0.1 or 1/9"
        raise ConfigError(f"{what}={word!r} is not {wanted}") from None
