"""What a tool declares, read from a callable: name, description, arguments as JSON Schema, limits.

Knows nothing of suites, files, or of how and when a tool runs.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from actors.errors import InputError, ToolError
from actors.messages import Task

ARGUMENT_TYPES = "str, int, float, bool, Literal, list[str], or one of these | None"


class Spec(TypedDict):
    """What a model is told of a tool; the three fields of `actors.formats.ToolSpec`."""

    name: str
    description: str
    parameters: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument that the model fills in.

    Attributes:
        adapter: checks and converts what the model wrote.
        schema: its JSON Schema.
    """

    adapter: TypeAdapter[Any]
    schema: Mapping[str, Any]
    required: bool


@dataclass(frozen=True, slots=True)
class Tool:
    """A declared tool. Lives in the process that loaded it; never pickled.

    Attributes:
        name: as the model writes it; compared without case.
        description: the first line of the callable's docstring.
        arguments: by name, in the callable's order.
        make: one trajectory's instance from its Task; tools that share `make` share the instance.
        method: name of the instance's method to call.
        is_async: the method is awaited in the event loop; otherwise it runs in a thread.
        timeout_s: seconds a call may take.
        max_tokens: tokens of the result that the model gets to see.
        idempotent: a call may be repeated after a failure without harm.
        stateful: one instance a trajectory, whose later calls may depend on earlier ones.
        env: environment variables that the tool reads.
        options: what configured it, for `tools_sha`.
        files: files whose content decides what it does, for `tools_sha`.
    """

    name: str
    description: str
    arguments: Mapping[str, Argument]
    make: Callable[[Task], object]
    method: str = "__call__"
    is_async: bool = False
    timeout_s: float = 30.0
    max_tokens: int = 512
    idempotent: bool = False
    stateful: bool = False
    env: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    files: tuple[Path, ...] = ()

    @property
    def spec(self) -> Spec:
        """Name, description and parameters (a JSON Schema object), for the model."""
        return {
            "name": self.name,
            "description": self.description,
            "parameters": {
                "type": "object",
                "properties": {name: dict(argument.schema) for name, argument in self.arguments.items()},
                "required": [name for name, argument in self.arguments.items() if argument.required],
                "additionalProperties": False,
            },
        }

    def check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments converted to their types; ToolError says which is wrong and what was wanted."""
        checked: dict[str, Any] = {}
        for name in arguments:
            if name not in self.arguments:
                known = ", ".join(self.arguments) or "no arguments"
                raise ToolError(f"Wrong arguments for {self.name}: there is no {_short(name)}; it takes {known}.")
        for name, argument in self.arguments.items():
            if name not in arguments:
                if argument.required:
                    wants = _words(argument.schema)
                    raise ToolError(f"Wrong arguments for {self.name}: {name} is missing; wants {wants}.")
                continue
            try:
                checked[name] = argument.adapter.validate_python(arguments[name])
            except ValidationError as e:
                wants, got = _words(argument.schema), _short(arguments[name])
                raise ToolError(f"Wrong arguments for {self.name}: {name} wants {wants}, got {got}.") from e
        return checked


class _Wrong:
    """Makes the InputError of one tool's declaration."""

    def __init__(self, name: str, field: str, file: str | None):
        self._name, self._field, self._file = name, field, file

    def __call__(self, what: str, got: object = None, wants: str = "") -> InputError:
        return InputError(f"tool {self._name}: {what}", field=self._field, file=self._file, got=got, wants=wants)


def declare(
    target: Any, *, name: str, field: str, file: str | None = None, args: Mapping[str, Any], **limits: Any
) -> Tool:
    """The Tool of a function, an object with `__call__`, or a class with `__call__`.

    A parameter annotated `Task` (of the function, or of the class's `__init__`) gets the trajectory's task;
    those in `args` get their value from there; the model fills in the others.

    Args:
        target: what the suite's `use:` names.
        name: the tool's name, unless the target has an attribute `name` that is a string.
        field: where in `file` it was named, for errors.
        file: the suite's file, for errors.
        args: fixed arguments, of `__init__` for a class.
        limits: further fields of Tool.

    Raises:
        InputError: no callable, no docstring, an unannotated or unsupported argument, wrong `args`.
    """
    wrong = _Wrong(name, field, file)
    is_class, is_function = inspect.isclass(target), inspect.isroutine(target)
    if not callable(target) or (is_class and "__call__" not in dir(target)):
        raise wrong("it cannot be called", got=target, wants="a function, or a class with __call__")
    call: Any = target if is_function else (target if is_class else type(target)).__call__
    taker = target.__init__ if is_class else call  # of `args` and of the task
    taken = _fixed(
        _parameters(taker, not is_function, wrong), _hints(taker, wrong), args, needs_all=is_class, wrong=wrong
    )
    own = () if is_class else tuple(taken)
    arguments = _arguments(call, not is_function, own, wrong)

    def make(task: Task) -> object:
        values = {key: task if value is Task else value for key, value in taken.items()}
        return target(**values) if is_class else functools.partial(target, **values)

    own_name = getattr(target, "name", None)
    return Tool(
        name=own_name if isinstance(own_name, str) else name,
        description=_description(target if inspect.getdoc(target) else call, wrong),
        arguments=arguments,
        make=make,
        is_async=inspect.iscoroutinefunction(call),
        stateful=is_class,
        **limits,
    )


def declare_method(owner: type, method: str, *, field: str, make: Callable[[Task], object], **limits: Any) -> Tool:
    """The Tool of one method of a class; tools with the same `make` share a trajectory's instance."""
    wrong = _Wrong(method, field, None)
    call = getattr(owner, method)
    return Tool(
        name=method,
        description=_description(call, wrong),
        arguments=_arguments(call, True, (), wrong),
        make=make,
        method=method,
        is_async=inspect.iscoroutinefunction(call),
        stateful=True,
        **limits,
    )


def _description(target: Any, wrong: _Wrong) -> str:
    lines = (inspect.getdoc(target) or "").splitlines()
    if not lines or not lines[0].strip():
        raise wrong("it has no docstring", wants="a first line that tells the model what the tool does")
    return lines[0].strip()


def _parameters(call: Any, has_self: bool, wrong: _Wrong) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(call).parameters.values())[has_self:]
    except (TypeError, ValueError) as e:
        raise wrong("its arguments cannot be read", got=call, wants="a Python function") from e


def _hints(call: Any, wrong: _Wrong) -> dict[str, Any]:
    try:
        return get_type_hints(call, include_extras=True) if inspect.isroutine(call) else {}
    except Exception as e:  # evaluating a user's annotations runs the user's code
        raise wrong(f"its type hints cannot be read: {e}") from e


def _fixed(
    parameters: list[inspect.Parameter],
    hints: Mapping[str, Any],
    args: Mapping[str, Any],
    *,
    needs_all: bool,
    wrong: _Wrong,
) -> dict[str, Any]:
    """Parameters that the model does not fill in: `args`, and the class Task in place of the task."""
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    names = [p.name for p in named]
    for name in args:
        if name not in names and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            raise wrong("unknown name in args", got=name, wants=" or ".join(names) or "no args")
    fixed = {name: Task for name in names if hints.get(name) is Task} | dict(args)
    for p in named:
        if needs_all and p.default is p.empty and p.name not in fixed:
            raise wrong(f"__init__ needs {p.name!r}", wants=f"a default, or args: {{{p.name}: …}}")
    return fixed


def _arguments(call: Any, has_self: bool, fixed: tuple[str, ...], wrong: _Wrong) -> dict[str, Argument]:
    hints = _hints(call, wrong)
    result = hints.get("return", str)
    if get_origin(result) in (Awaitable, Coroutine):
        result = get_args(result)[-1]
    if result not in (str, Any):
        raise wrong("wrong return type", got=result, wants="str")
    return {p.name: _argument(p, hints, wrong) for p in _parameters(call, has_self, wrong) if p.name not in fixed}


def _argument(parameter: inspect.Parameter, hints: Mapping[str, Any], wrong: _Wrong) -> Argument:
    if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
        raise wrong(f"argument {parameter} cannot be passed by name", wants="plain named arguments")
    if parameter.name not in hints:
        raise wrong(f"argument {parameter.name!r} has no type hint", wants=ARGUMENT_TYPES)
    hint = hints[parameter.name]
    if not _supported(hint):
        raise wrong(f"argument {parameter.name!r} has an unsupported type", got=hint, wants=ARGUMENT_TYPES)
    adapter = TypeAdapter[Any](hint, config={"coerce_numbers_to_str": True})
    schema = adapter.json_schema()
    required = parameter.default is parameter.empty
    if not required:
        schema["default"] = parameter.default
    return Argument(adapter, schema, required)


def _supported(hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _supported(inner[0])
    if origin in (Union, types.UnionType):
        return all(option is type(None) or _supported(option) for option in inner)
    if origin is Literal:
        return all(isinstance(value, str | int) for value in inner)
    return hint in (str, int, float, bool) or (origin is list and inner == (str,))


def _words(schema: Mapping[str, Any]) -> str:
    """A JSON Schema in a model's words."""
    if "anyOf" in schema:
        return " or ".join(_words(option) for option in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(map(repr, schema["enum"]))
    if "const" in schema:
        return repr(schema["const"])
    if schema.get("type") == "array":
        return "a list of strings"
    return {"integer": "an integer", "null": "null"}.get(str(schema.get("type")), f"a {schema.get('type')}")


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
