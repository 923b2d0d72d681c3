"""Evaluate the policy of a run.

    python utils/evaluate.py benchmark_runs/Hopper-v4__smoothie_continuous__1
    python utils/evaluate.py RUN_DIR --noise 0.2 --episodes 50 --video hopper.mp4
    python utils/evaluate.py RUN_DIR --watch

By default this repeats the last evaluation of the run exactly, on a machine of the same kind. The
folder needs the run's policy.pt and config.json, and its copy of the script if the one in this
repository has changed since.
"""

import dataclasses
import importlib.util
import json
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro


@dataclass
class Args:
    run_dir: tyro.conf.Positional[Path]  # run folder
    episodes: int | None = None  # number of episodes; by default that of the run
    noise: float = 0.0  # std of the noise on the actions, in normalised units: bounds at -1 and 1
    video: Path | None = None  # MP4 file to write, of the first episode
    watch: bool = False  # show the episodes in a window; with Tab the camera follows the robot


def load_script(run_dir):
    """Return the module that made a run, from the copy in its folder, and the run's Args."""
    if not (run_dir / "config.json").exists():
        sys.exit(f"{run_dir}: holds no run (no config.json)")
    config = json.loads((run_dir / "config.json").read_text())
    path = run_dir / config["script"]
    if not path.exists():
        path = Path(__file__).parents[1] / config["script"]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    flags = {field.name for field in dataclasses.fields(script.Args)}
    return script, script.Args(**{key: value for key, value in config.items() if key in flags})


def make_agent(script, env, args):
    """Return an untrained agent, in the same settings of PyTorch as when the run was made."""
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    agent_class = script.DDPG if hasattr(script, "DDPG") else script.Smoothie
    return agent_class(env.observation_space.shape[0], env.action_space.shape[0], args)


def load_actor(run_dir, script, env, args):
    """Return the policy of a run, on the device where it was evaluated."""
    actor = make_agent(script, env, args).actor
    actor.load_state_dict(torch.load(run_dir / "policy.pt", "cpu", weights_only=True))
    on_gpu = args.cuda and torch.cuda.is_available()
    return actor.to("cuda" if on_gpu else "cpu")


def add_noise(env, std, seed):
    """Return an environment that adds Gaussian noise to actions, in normalised units."""
    rng = np.random.default_rng(seed)

    def noisy(action):
        return action + std * rng.standard_normal(len(action), np.float32)

    return gym.wrappers.TransformAction(env, noisy, env.action_space)


def main(args):
    """Print and return the (return, length) of each episode."""
    if args.video and args.watch:
        sys.exit("--video and --watch exclude each other")
    if args.video:
        args.video.parent.mkdir(parents=True, exist_ok=True)
    script, run_args = load_script(args.run_dir)
    if args.episodes is not None:
        run_args.eval_episodes = args.episodes

    with tempfile.TemporaryDirectory() as folder:
        if args.video:
            env = gym.wrappers.RecordVideo(
                script.make_env(run_args.env_id, render_mode="rgb_array"),
                f"{folder}/videos",
                episode_trigger=lambda episode: episode == 0,
            )
        else:
            how = {"render_mode": "human"} if args.watch else {}  # some tasks take no render_mode
            env = script.make_env(run_args.env_id, **how)
        if args.noise:
            env = add_noise(env, args.noise, run_args.seed)

        actor = load_actor(args.run_dir, script, env, run_args)
        results = script.evaluate(actor, env, run_args)
        env.close()  # writes the video if there is only one episode
        if args.video:
            (video,) = Path(folder, "videos").glob("*.mp4")
            shutil.move(video, args.video)

    for episode, (episode_return, length) in enumerate(results):
        print(f"episode {episode}: return {episode_return:.2f}, length {length}")
    print(f"mean return {np.mean(results, 0)[0]:.2f}")
    return results


if __name__ == "__main__":
    sys.path.insert(0, "")  # so that the run's --env-id my_module:MyTask-v0 finds my_module.py here
    warnings.filterwarnings("ignore", message=".*is out of date")  # papers use v4
    main(tyro.cli(Args, description=__doc__))
