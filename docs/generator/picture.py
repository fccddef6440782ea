"""The diagram of docs/explanation/prefix.md: the block in the paper and the block in lensrack, as plain SVG."""

from __future__ import annotations

PROMPT, IMAGE, GONE, INK = "#d97706", "#2563eb", "#9ca3af", "#1f2937"


def prefix() -> str:
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 300" font-family="sans-serif" font-size="13"'
        ' role="img" aria-label="Left: prompts as tokens pass through the whole block, and their outputs are discarded.'
        ' Right: keys and values of the prompts, computed once, are put before those of the image.">',
        '<rect width="760" height="300" fill="#ffffff"/>',
        *_literal(20),
        *_prefixed(410),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _literal(x: int) -> list[str]:
    return [
        _words(x, 24, "as in the paper: prompts are tokens", weight="bold"),
        *_tokens(x, 230, 3, PROMPT, "P"),
        *_tokens(x + 105, 230, 6, IMAGE, "x"),
        _box(x, 165, 305, "queries, keys, values; attention among all tokens"),
        _box(x, 110, 305, "MLP for all tokens"),
        *_tokens(x, 50, 3, GONE, "✕"),
        *_tokens(x + 105, 50, 6, IMAGE, "x"),
        _words(x, 285, "the next layer has its own prompts"),
        *_arrows(x, (222, 203), (157, 148), (102, 85)),
    ]


def _prefixed(x: int) -> list[str]:
    return [
        _words(x, 24, "in lensrack: prompts are keys and values", weight="bold"),
        *_tokens(x, 165, 3, PROMPT, "kv"),
        *_tokens(x + 105, 230, 6, IMAGE, "x"),
        _box(x + 105, 165, 200, "attention: K = [kv; K(x)]"),
        _box(x + 105, 110, 200, "MLP"),
        *_tokens(x + 105, 50, 6, IMAGE, "x"),
        _words(x, 285, "kv: computed once with the lens, for every image"),
        *_arrows(x + 105, (222, 203), (157, 148), (102, 85)),
        f'<path d="M {x + 88} 183 H {x + 101}" stroke="{PROMPT}" stroke-width="2"/>',
    ]


def _tokens(x: int, y: int, count: int, colour: str, word: str) -> list[str]:
    return [
        f'<rect x="{x + 34 * i}" y="{y}" width="28" height="28" rx="4" fill="{colour}"/>'
        f'<text x="{x + 34 * i + 14}" y="{y + 19}" text-anchor="middle" fill="#ffffff">{word}</text>'
        for i in range(count)
    ]


def _box(x: int, y: int, width: int, text: str) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="36" rx="4" fill="none" stroke="{INK}"/>'
        f'<text x="{x + width / 2:g}" y="{y + 23}" text-anchor="middle" fill="{INK}">{text}</text>'
    )


def _words(x: int, y: int, text: str, weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" fill="{INK}" font-weight="{weight}">{text}</text>'


def _arrows(x: int, *spans: tuple[int, int]) -> list[str]:
    return [f'<path d="M {x + 100} {low} V {high}" stroke="{INK}" stroke-width="2"/>' for low, high in spans]
