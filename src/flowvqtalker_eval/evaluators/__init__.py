"""Evaluators that this project trains itself, where no published weights can be had: lip sync and emotion."""

#: Stage of ``flowvqtalker train`` -> its module.
STAGES = {
    "sync": "flowvqtalker_eval.evaluators.sync_training",
    "motion-emotion": "flowvqtalker_eval.evaluators.motion_emotion",
}
