"""`kvferry doctor`: tries each part of a stack on this machine, for real, and says what mends what is wrong.

model.py       the model's directory, and whether it fits into memory
engine.py      processor, compiler, and the engine that starts (`kvferry.worker.probe`, a process of its own)
data_plane.py  what the loaded UCX has, and a transfer (`kvferry.transport.probe`, a process of its own)
bus.py         NATS: credentials, round trip, max_payload
machine.py     ports, shared memory
clock.py       this machine's clock against those of gateways and workers
service.py     one after the other, and the report
"""
