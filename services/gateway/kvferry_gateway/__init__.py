"""The gateway: OpenAI's HTTP API in front, placement, and the streams of tokens back to clients.

The life of a request, file by file:

1. `http.py` parses HTTP, `app.py` finds the route, `auth.py` the key, `openai.py` validates the body.
2. `prompt.py` renders the chat template, tokenises, and checks lengths.
3. `placement.py` picks workers from a snapshot of `registry.py`; `offer.py` asks them, and when one of
   them is lost, `flight.py` places the rest of the request anew. Each placement is an `attempt.py`.
4. `dispatcher.py` walks the token batches that come back and appends ready bytes to `streams.py`, which
   writes straight to the client's `connection.py`.
5. `answers.py` holds the JSON around the text; `completions.py` is the route that runs 1 to 5.

`fleet.py` knows the workers: it hears them through `inbox.py` and writes to them through `mail.py`, the only files that
talk to the bus but for its own heartbeat. `service.py` starts and ends everything.
"""
