"""Encoded blocks of one encoding as another's, exactly or not at all."""
