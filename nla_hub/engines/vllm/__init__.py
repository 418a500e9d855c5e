"""An AV on vLLM: `engine.py` is the engine, `start.py` starts and stops vLLM, `room.py` counts its memory."""
