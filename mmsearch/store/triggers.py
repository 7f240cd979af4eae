"""Full-text tables, and the triggers that keep tables in step: SQLite's own, so in its language."""

from __future__ import annotations

#: The columns of `words`, and which sources of captions each is for: a search can weigh them.
COLUMNS = {
    "sidecar": "source = 'sidecar'",
    "file": "(source = 'file' OR source GLOB 'file:*')",
    "embedded": "source = 'embedded'",
    "name": "source = 'name'",
    "model": "source GLOB 'model:*'",
    "read_text": "source = 'text'",
}
_NAMES = ", ".join(COLUMNS)
_TEXTS = ", ".join(
    f"group_concat(CASE WHEN {condition} THEN text END, char(10))" for condition in COLUMNS.values()
)
#: What a caption is about: a segment, or all of its file, which has the id of its first segment.
SEGMENT = "coalesce(segment_id, media_id)"
_FILL = f"INSERT INTO words (rowid, {_NAMES}) SELECT {SEGMENT}, {_TEXTS} FROM caption"

#: The captions of each segment, under its id; and letters, three by three, of texts in pictures,
#: under the id of the caption.
WORDS = (
    f"""CREATE VIRTUAL TABLE words USING fts5(
        {_NAMES}, tokenize = 'porter unicode61 remove_diacritics 2')""",
    "CREATE VIRTUAL TABLE read_text USING fts5(text, tokenize = 'trigram')",
)


def _replaced(row: str) -> str:
    """Replaces the words of the segment that a caption is about."""
    segment = f"coalesce({row}.segment_id, {row}.media_id)"
    return (
        f"DELETE FROM words WHERE rowid = {segment}; "
        f"{_FILL} WHERE media_id = {row}.media_id AND {SEGMENT} = {segment} GROUP BY {SEGMENT};"
    )


TRIGGERS = (
    f"""CREATE TRIGGER caption_after_insert AFTER INSERT ON caption BEGIN
        {_replaced("NEW")}
        INSERT INTO read_text (rowid, text) SELECT NEW.id, NEW.text WHERE NEW.source = 'text';
    END""",
    f"""CREATE TRIGGER caption_after_delete AFTER DELETE ON caption BEGIN
        {_replaced("OLD")}
        DELETE FROM read_text WHERE rowid = OLD.id;
    END""",
    # Before, or the reference would forbid it.
    """CREATE TRIGGER media_before_delete BEFORE DELETE ON media BEGIN
        DELETE FROM patch_embedding WHERE media_id = OLD.id;
        DELETE FROM segment WHERE media_id = OLD.id;
    END""",
)

#: Replaces the words of all captions.
FILL_WORDS = (
    "DELETE FROM words",
    f"{_FILL} GROUP BY {SEGMENT}",
    "DELETE FROM read_text",
    "INSERT INTO read_text (rowid, text) SELECT id, text FROM caption WHERE source = 'text'",
)
