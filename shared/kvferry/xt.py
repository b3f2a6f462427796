import atexit, os, time, json, sys
EV = []
def ev(*a):
    EV.append((time.perf_counter(),) + a)
def dump():
    if EV: json.dump(EV, open(f"/tmp/xt/{os.getpid()}.json", "w"))
atexit.register(dump)
