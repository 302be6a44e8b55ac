"""Texts to train tokenizers on, and texts that tokenizers get wrong."""

from __future__ import annotations

from tests.unit.submodels.synthetic_run import TEXT

CORPUS = [
    TEXT,
    "class A:\n\n    def f(self, x=1):\n        '''doc'''\n        return x  # ----------\n",
    "if a == b and c != d:\n\tprint('====', 2024, \"naïve café\", [1, 22, 333])\n",
] * 4
ODD = [
    "", " ", "  ", "\n", "\t\t x", "a  b   c    d", "    def f():\n\treturn 1\r\n", "----- ===",
    "\u2581", "a\u2581b \u2581", "</s>", "<s> <unk> </s>x", "<0x0A>", "\x00\x7f", "\ufeff\u200b",
    "e\u0301 é", "漢字かな", "😀👩\u200d👧", "שלום עולם", "\U0010ffff", "ﬁ ①", "naïve café",
]  # fmt: skip
