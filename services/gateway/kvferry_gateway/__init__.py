"""The gateway: OpenAI's HTTP API in front, placement, and the streams of tokens back to clients.

The life of a request, folder by folder:

1. `http/` has the connection, the key and its limits; `app.py` finds the route, `body.py` validates the body.
2. `requests/` makes sense of it: fields, chat template, tokens, grammar, and how the answer is to be read.
3. `placement/` picks workers from what they have told; `flights/` asks them, and when one of them is lost, places the
   rest of the request anew. Each placement is an attempt.
4. `streams/` walks the token batches that come back and appends ready bytes to each choice's text, which it writes
   straight to the client's connection.
5. `answers/` holds the JSON around the text; `completions.py` is the route that runs 1 to 5.

`parsing/` finds thoughts and tool calls in a text, `responses/` and `console/` are routes of their own. `fleet/` knows
the workers: it is all that talks to the bus. `service.py` starts and ends everything.
"""
