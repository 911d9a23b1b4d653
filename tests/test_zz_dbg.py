import asyncio, signal
from tests.conftest import *
from plora.device_runtime import open_session
import plora.device_runtime.transport as t
def test_x(made, served):
    s = open_session(made.out/"edge", served)
    tr = s._transport
    real = tr.receive; send = tr.send
    async def logsend(d):
        from plora.protocol import plora_pb2 as pb
        print("send", pb.Frame.FromString(d).WhichOneof("kind"), len(d), tr.reading)
        await send(d)
    tr.send = logsend
    left=[0]
    async def receive():
        print("receive", left, tr.reading)
        if left[0]==0:
            left[0]-=1
            signal.raise_signal(signal.SIGINT)
        try:
            d= await real()
        except BaseException as e:
            print("exc", repr(e)); raise
        left[0]-=1
        return d
    tr.receive=receive
    try:
        answer(s,[5,6,7,8],16)
    except BaseException as e: print("OUT", repr(e))
    tr.receive=real
    print(answer(s,[5,6,7],16))
    s.close()
