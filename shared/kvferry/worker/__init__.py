"""The shell that both workers share: engine thread, heartbeat, outbox, drain, debug port."""
