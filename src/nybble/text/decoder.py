"""IncrementalDecoder: token ids to text as they come, never half a character."""

from __future__ import annotations

import codecs

from nybble.text.vocabulary import TokenType, Vocabulary


class IncrementalDecoder:
    """Turns tokens into text one at a time.

    A character whose bytes are spread over several tokens comes out with its last byte. Bytes that
    are not UTF-8 become U+FFFD. All pieces of ``add`` and the one of ``finish`` joined are what
    ``Tokenizer.decode`` gives for the same ids.

    ``space_prefix`` says that the encoder puts a space before every plain piece of text: that
    space is taken away again from the first text token and from the first one after a token that
    the encoder treats as special.
    """

    def __init__(
        self, vocabulary: Vocabulary, *, skip_special: bool = True, space_prefix: bool = False
    ) -> None:
        self._vocabulary = vocabulary
        self._skip_special = skip_special
        self._space_prefix = space_prefix
        self._at_start = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """Text that is complete after this token; empty while a character is unfinished."""
        vocabulary = self._vocabulary
        special = vocabulary.is_special(token_id)
        if special and self._skip_special:
            self._at_start = True
            return ""
        data = vocabulary.token_bytes(token_id)
        if special or vocabulary.types.item(token_id) == TokenType.USER_DEFINED:
            self._at_start = True
        elif data and self._at_start:
            if self._space_prefix and data.startswith(b" "):
                data = data[1:]
            self._at_start = False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left: U+FFFD for an unfinished character, else nothing. Resets the decoder."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self._at_start = True
        return rest
