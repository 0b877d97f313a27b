"""Tools that an agent may call: how they are declared, loaded and run under limits, and the built-in ones.

    declare.py     Tool: a callable's name, description, arguments and limits
    load.py        suite.yaml's `tools:` → Tools; user modules by file location
    toolbox.py     one trajectory's tools: time limits, size limits, errors as observations
    search.py      Search[entity] and Lookup[keyword] over a corpus or the task's own paragraphs
    calculator.py  Calculator[expression]

Knows nothing of Ray, models, prompt formats or storage.
"""

from actors.tools.declare import Spec, Tool, declare
from actors.tools.load import load_attribute, load_tools, tools_sha
from actors.tools.toolbox import Cut, Toolbox, ToolResult, ToolThreads

__all__ = [
    "Cut",
    "Spec",
    "Tool",
    "ToolResult",
    "ToolThreads",
    "Toolbox",
    "declare",
    "load_attribute",
    "load_tools",
    "tools_sha",
]
