"""Serve animation on a Ray cluster: replicas keep the models loaded, and Ray Serve starts as many as the load needs.

    pip install 'flowvqtalker[ray]' 'ray[serve]' python-multipart
    cd examples && serve run ray_serve:app
    curl -F portrait=@anna.jpg -F speech=@hello.wav -F emotion=happy http://127.0.0.1:8000/animate -o out.mp4

It trusts its callers: put it behind a gateway that authenticates them and limits sizes. `flowvqtalker serve` has both,
for one machine.
"""

import shutil
import tempfile
from pathlib import Path

from fastapi import FastAPI, Form, Response, UploadFile
from fastapi.responses import JSONResponse
from ray import serve

from flowvqtalker.batch.job import Job
from flowvqtalker.batch.runner import Runner

api = FastAPI()


@serve.deployment(
    ray_actor_options={"num_cpus": 2},  # for GPUs: {"num_gpus": 1}
    max_ongoing_requests=1,  # a replica animates one video at a time; the others wait or start replicas
    autoscaling_config={"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 1},
)
@serve.ingress(api)
class Animator:
    """The job function of `flowvqtalker batch` behind HTTP."""

    def __init__(self, weights: Path | None = None, device: str = "auto", threads: int = 2) -> None:
        self.runner = Runner(threads)
        self.weights, self.device = weights, device

    @api.post("/animate")
    def animate(
        self, portrait: UploadFile, speech: UploadFile, emotion: str = Form("neutral"), seed: int = Form(0)
    ) -> Response:
        """The video, or 422 with the reason why there is none."""
        with tempfile.TemporaryDirectory() as folder:
            files = {}
            for name, upload in (("portrait", portrait), ("speech", speech)):
                files[name] = Path(folder) / (name + Path(upload.filename or "").suffix)
                with open(files[name], "wb") as file:
                    shutil.copyfileobj(upload.file, file)
            output = Path(folder) / "video.mp4"
            outcome = self.runner.run(
                Job(**files, output=output, emotion=emotion, seed=seed, weights=self.weights, device=self.device)
            )
            if outcome.error:
                return JSONResponse({"detail": outcome.error.replace(f"{folder}/", "")}, status_code=422)
            return Response(output.read_bytes(), media_type="video/mp4")


app = Animator.bind()
