"""The example agents: what they do besides calling other people's services."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from flowvqtalker.errors import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_livekit_agent_shows_emotions():
    pytest.importorskip("livekit.agents")
    said = []

    def set_emotion(emotion):
        if emotion == "merry":
            raise UserError("unknown emotion 'merry'")
        said.append(emotion)

    agent = load("livekit_agent").Assistant(SimpleNamespace(set_emotion=set_emotion))
    assert [tool.info.name for tool in agent.tools] == ["show_emotion"]
    assert asyncio.run(agent.show_emotion("happy")) == "shown" and said == ["happy"]
    assert "unknown" in asyncio.run(agent.show_emotion("merry"))


def test_the_pipecat_agent_takes_emotions_out_of_the_text(live, monkeypatch):
    pytest.importorskip("pipecat")
    pytest.importorskip("aiortc")
    from pipecat.frames.frames import LLMFullResponseEndFrame, LLMTextFrame, ServiceUpdateSettingsFrame
    from pipecat.processors.frame_processor import FrameProcessor
    from pipecat.tests.utils import run_test

    example = load("pipecat_agent")
    texts = ["[hap", "py] Hello", " there. [sad]", "Oh no", " [5"]
    frames = [LLMTextFrame(text) for text in texts] + [LLMFullResponseEndFrame()]
    down, _ = asyncio.run(run_test(example.EmotionTags(), frames_to_send=frames))
    found = []
    for frame in down:
        if isinstance(frame, ServiceUpdateSettingsFrame):
            found.append(f"<{frame.delta.emotion}>")
        elif isinstance(frame, LLMTextFrame):
            found.append(frame.text)
    assert "".join(found) == "<happy>Hello there. <sad>Oh no [5"

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    transport = SimpleNamespace(input=FrameProcessor, output=FrameProcessor)
    assert example.pipeline(transport, example.FlowVQTalkerVideoService(live))
