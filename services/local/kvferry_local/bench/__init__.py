"""`kvferry bench`: a load on any OpenAI-compatible endpoint, and what its clients see.

workload.py   when requests arrive and how long they are: a pattern, or a recorded trace (`trace.py`)
prompts.py    text of a length, with the prefixes that a trace shares
sse.py        HTTP/1.1 and server-sent events, read with the time of each event
endpoint.py   where requests go, and a whole answer from there
stream.py     one streamed answer
client.py     one request of a load, and what came of it
load.py       all of them: in time, or so many at once
summary.py    TTFT, ITL, goodput
picture.py    the same as an SVG
"""
