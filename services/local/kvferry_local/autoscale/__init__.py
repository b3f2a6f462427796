"""`kvferry autoscale`: adds and drains prefill and decode workers, each by signals of its own.

signals.py    what the gateway sees of the workers -> what a decision needs
decision.py   signals and rules -> how many are wanted, and when to act on it; pure
autoscaler.py  both roles, one look after the other
target.py     who starts and drains: `kvferry up`, docker compose, a command
service.py    the loop
"""
