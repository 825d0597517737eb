# Written as scripts of the field are.

"""A short second-order search in the style of DARTS."""

import argparse
import json
import logging
import os
import sys

import numpy as np
import torch
import torch.nn as nn
import utils
from architect import Architect
from model_search import Network
from torch.autograd import Variable

parser = argparse.ArgumentParser("darts")
parser.add_argument("--save", type=str, default="search")
parser.add_argument("--seed", type=int, default=2)
parser.add_argument("--batch_size", type=int, default=6)
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--init_channels", type=int, default=2)
parser.add_argument("--nodes", type=int, default=4)
parser.add_argument("--layers", type=int, default=3)
parser.add_argument("--image_size", type=int, default=8)
parser.add_argument("--learning_rate", type=float, default=0.025)
parser.add_argument("--arch_learning_rate", type=float, default=3e-2)
parser.add_argument("--copy", choices=("deepcopy", "new"), default="deepcopy")
args = parser.parse_args()
utils.create_exp_dir(args.save)
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")


def batch(step, offset):
    generator = torch.Generator().manual_seed(1000 * offset + step)
    shape = (args.batch_size, 3, args.image_size, args.image_size)
    images = torch.randn(*shape, generator=generator)
    labels = torch.randint(0, 4, shape[:1], generator=generator)
    return Variable(images, requires_grad=False), Variable(labels, requires_grad=False)


def main():
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    criterion = nn.CrossEntropyLoss()
    model = Network(args.init_channels, 4, args.layers, criterion, args.nodes, args.nodes)
    architect = Architect(model, args)
    optimizer = torch.optim.SGD(
        architect.weights(model), args.learning_rate, momentum=0.9, weight_decay=3e-4
    )
    losses = []
    for step in range(args.steps):
        input, target = batch(step, 1)
        architect.step((input, target), batch(step, 2), args.learning_rate)
        optimizer.zero_grad()
        loss = model._loss(input, target)
        loss.backward()
        nn.utils.clip_grad_norm_(architect.weights(model), 5)
        optimizer.step()
        losses.append(loss.data[0].item() if loss.dim() else loss.item())
        logging.info("train %03d %f", step, losses[-1])
    logging.info("genotype = %s", model.genotype())
    utils.save(model, os.path.join(args.save, "weights.pt"))
    result = {
        "losses": losses,
        "alphas": [a.tolist() for a in model.arch_parameters()],
        "genotype": model.genotype(),
    }
    with open(os.path.join(args.save, "result.json"), "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
