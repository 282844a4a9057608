"""Random multilingual texts, the same for the same seed: what tokenizers disagree about."""

from __future__ import annotations

import random

_LETTERS = {
    "ascii": "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "latin": "àáâãäåæçèéêëìíîïñòóôõöøùúûüýÿßœšžąćęłńśźżőűğışÀÉÎÕÜŠŽŁİ",
    "cyrillic": "абвгдеёжзийклмнопрстуфхцчшщъыьэюяАБВГДЕЖЗЇІЄҐўқң",
    "greek": "αβγδεζηθικλμνξοπρσςτυφχψωάέήίόύώΑΒΓΔΩ",
    "cjk": "的一是不了人我在有他这中大来上国個們時間漢字日本語東京ひらがなカタカナ한국어글자𠮷㐀",
    "arabic": "ابتثجحخدذرزسشصضطظعغفقكلمنهويءآأؤإئىةپچژگ",
    "hebrew": "אבגדהוזחטיכלמנסעפצקרשתםןךףץ",
    "devanagari": "अआइईउऊएऐओऔकखगघचछजझटठडढणतथदधनपफबभमयरलवशषसहािीुूेैोौ्ंः",
    "thai": "กขคงจฉชซญดตถทธนบปผฝพฟภมยรลวศษสหอฮะาิีึืุูเแโใไ่้",
    "georgian": "აბგდევზთიკლმნოპჟრსტუფქღყშჩცძწჭხჯჰ",
}
_EMOJI = ["😀", "🚀", "👩‍👩‍👧‍👦", "👨🏽‍💻", "🏳️‍🌈", "🇩🇪", "1️⃣", "❤️", "🤷🏿‍♀️", "☃", "🫠"]
_MARKS = "\u0300\u0301\u0303\u0308\u0327\u0328\u20d7\u0361\u064b\u0651\u093c"
_CONTROL = (
    "\x00\x01\x07\x08\x0b\x0c\x1b\x7f\x85\xa0\xad\u200b\u200d\u2028\u2029\u202e\u2060\ufeff\ufffd\ue000"
)
_BLANK = [
    " ",
    "  ",
    "   ",
    "     ",
    "\t",
    "\t\t",
    "\n",
    "\n\n",
    "\n\n\n",
    "\r\n",
    " \n",
    "\n ",
    "\u3000",
    " \t ",
]
_PUNCTUATION = list(".,;:!?…-–—'\"`’“”«»()[]{}<>/\\|@#$%^&*_+=~§©®™°±×÷€£¥₿∑√∞≠≤→⇒·•Ġ")
_CODE = [
    "def f(x):\n    return x + 1\n",
    "for (int i = 0; i < n; ++i) {\n\ta[i] *= 2;\n}",
    '<div class="a">text</div>',
    "SELECT * FROM t WHERE id = 42;",
    "x->y::z != NULL && !done",
    '{"key": [1, 2.5e-3, null]}',
    "https://example.org/a?b=c&d=%20#e",
    "I'm you're WE'LL they'd it's don'T",
]


def _piece(random_: random.Random) -> str:
    kind = random_.randrange(12)
    if kind < 5:
        letters = random_.choice(list(_LETTERS.values()))
        word = "".join(random_.choice(letters) for _ in range(random_.randint(1, 9)))
        return random_.choice([word, word, word.capitalize(), word.upper()])
    if kind == 5:
        return random_.choice(_EMOJI)
    if kind == 6:
        letters = random_.choice(list(_LETTERS.values()))
        return "".join(random_.choice(letters) + random_.choice(_MARKS) for _ in range(random_.randint(1, 4)))
    if kind == 7:
        return str(random_.randrange(10 ** random_.randint(1, 12))) if random_.random() < 0.8 else "٣٤५६½²Ⅷ"
    if kind == 8:
        return "".join(random_.choice(_PUNCTUATION) for _ in range(random_.randint(1, 5)))
    if kind == 9:
        return random_.choice(_CODE)
    if kind == 10:
        return random_.choice(_CONTROL) * random_.randint(1, 2)
    return random_.choice(_BLANK) * random_.randint(1, 4)


def random_texts(count: int, seed: int) -> list[str]:
    """``count`` texts of up to 30 pieces, most of them joined by white space."""
    random_ = random.Random(seed)
    texts = []
    for _ in range(count):
        pieces = []
        for _ in range(random_.randint(1, 30)):
            pieces.append(_piece(random_))
            if random_.random() < 0.6:
                pieces.append(" " if random_.random() < 0.8 else random_.choice(_BLANK))
        texts.append("".join(pieces))
    return texts
