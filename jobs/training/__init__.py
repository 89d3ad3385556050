"""The training loop and its parts.

loop.py             next batch, loss, backward, clip, step, log, checkpoint; without Ray
trainee.py          what a model brings to it: batches, inputs, objective, validation, export
language_model.py   the AR and NAR models as trainees; the codecs are in jobs/train_codec.py and
                    jobs/train_quantizer.py
sampler.py loader.py augmentation.py   batches as a function of (seed, epoch, step, rank)
objective.py optimizer.py backends.py  losses; AdamW and learning rate; DDP and DeepSpeed
validation.py       held-out loss, samples, word error rate
recipe.py           the recipe's section `train`
resume.py           what must be the same when a run resumes
ray_train.py        the loop on a Ray cluster, tracked in MLflow
run_folder.py       a run's checkpoints and Ray's list of them, repaired before Ray reads them
"""
