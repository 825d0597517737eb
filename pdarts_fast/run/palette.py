"""Names and colours of the operations, for cell drawings, charts and the report's style sheet.

An operation's colour tells its kind (pooling, skip, separable, dilated, ...); operations of one
kind differ in shade and, in line charts, in dash, so that no reading depends on hue alone.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class OpStyle:
    """How one operation is written and drawn.

    Attributes:
        label: short readable name.
        light: ``#rrggbb`` on a light background.
        dark: ``#rrggbb`` on a dark background.
        dash: SVG ``stroke-dasharray`` of its line, empty for a solid line.
    """

    label: str
    light: str
    dark: str
    dash: str = ""


OP_STYLES: dict[str, OpStyle] = {
    "none": OpStyle("none", "#6b7280", "#9aa3af", "1.5 2.5"),
    "max_pool_3x3": OpStyle("max pool 3×3", "#b45309", "#f0a63c"),
    "avg_pool_3x3": OpStyle("avg pool 3×3", "#d08a1d", "#f6cf7d", "5 2.5"),
    "skip_connect": OpStyle("skip", "#be185d", "#f472a9"),
    "sep_conv_3x3": OpStyle("sep 3×3", "#1d4ed8", "#6ea0ff"),
    "sep_conv_5x5": OpStyle("sep 5×5", "#4f86ee", "#a9c7ff", "5 2.5"),
    "sep_conv_7x7": OpStyle("sep 7×7", "#15316f", "#8b9bf5", "8 2 2 2"),
    "dil_conv_3x3": OpStyle("dil 3×3", "#0f766e", "#2fc4ac"),
    "dil_conv_5x5": OpStyle("dil 5×5", "#23a58f", "#8fe3d2", "5 2.5"),
    "conv_7x1_1x7": OpStyle("conv 7×1, 1×7", "#6d28d9", "#b794ff"),
}

INK = {"light": "#1b2330", "dark": "#e7ebf2"}
MUTED = {"light": "#5a6475", "dark": "#a3adbd"}
SURFACE = {"light": "#ffffff", "dark": "#171c25"}


def op_style(op: str) -> OpStyle:
    """Returns the style of ``op``; one from outside the table is grey under its own name."""
    known = OP_STYLES.get(op)
    return known or OpStyle(op.replace("_", " "), MUTED["light"], MUTED["dark"])


def op_label(op: str) -> str:
    """Returns the short readable name of ``op``, for example ``sep 3×3`` for ``sep_conv_3x3``."""
    return op_style(op).label


def op_variable(op: str) -> str:
    """Returns the CSS variable that holds the colour of ``op`` in the report."""
    return f"--op-{op}" if op in OP_STYLES else "--muted"


def css_variables(scheme: str) -> str:
    """Returns the CSS declarations of all palette variables.

    Args:
        scheme: ``"light"`` or ``"dark"``.
    """
    lines = [
        f"--ink: {INK[scheme]};",
        f"--muted: {MUTED[scheme]};",
        f"--surface: {SURFACE[scheme]};",
        *(f"{op_variable(op)}: {getattr(style, scheme)};" for op, style in OP_STYLES.items()),
    ]
    return "\n  ".join(lines)
