"""Damaged files for property tests of readers, and what is left of them."""

from hypothesis import strategies as st

from dreamer4.data.ingest import Frame, Recording


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The content of a file with bits flipped, its end cut off, bytes put in, or a range overwritten with zeros."""
    broken = bytearray(content)
    at = draw(st.integers(0, len(content) - 1))
    match draw(st.sampled_from(["flip", "cut", "insert", "zero"])):
        case "flip":
            for place in [at, *draw(st.lists(st.integers(0, len(content) - 1), max_size=3))]:
                broken[place] ^= 1 << draw(st.integers(0, 7))
        case "cut":
            del broken[at:]
        case "insert":
            broken[at:at] = draw(st.binary(min_size=1, max_size=16))
        case "zero":
            end = min(len(content), at + draw(st.integers(1, 64)))
            broken[at:end] = bytes(end - at)
    return bytes(broken)


def runs_of(recording: Recording) -> list[list[Frame]]:
    """The frames that ``ingest`` would take for consecutive."""
    runs: list[list[Frame]] = [[]]
    for event in recording.events():
        if isinstance(event, Frame):
            runs[-1].append(event)
        else:
            runs.append([])
    return [run for run in runs if run]
