# Written as scripts of the field are.
# ruff: noqa: B905, UP
"""A short first-order search in the style of P-DARTS: stages, switches, skip dropout."""

import argparse
import json
import logging
import os
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import utils
from genotypes import PRIMITIVES, Genotype
from model_search import Network

parser = argparse.ArgumentParser("search")
parser.add_argument("--save", type=str, default="search", help="experiment folder")
parser.add_argument("--seed", type=int, default=2)
parser.add_argument("--batch_size", type=int, default=6)
parser.add_argument("--steps", type=int, default=3, help="steps an epoch")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--nodes", type=int, default=4, help="nodes a cell")
parser.add_argument("--init_channels", type=int, default=2)
parser.add_argument("--image_size", type=int, default=8)
parser.add_argument("--learning_rate", type=float, default=0.025)
parser.add_argument("--arch_learning_rate", type=float, default=6e-2)
parser.add_argument("--dropout_rate", action="append", default=[])
parser.add_argument("--add_layers", action="append", default=[])
args = parser.parse_args()

utils.create_exp_dir(args.save, scripts_to_save=[os.path.abspath(__file__)])
logging.basicConfig(
    stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M"
)
handler = logging.FileHandler(os.path.join(args.save, "log.txt"))
handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
logging.getLogger().addHandler(handler)


def parameters_in_MB(model):
    return np.sum(np.prod(v.size()) for name, v in model.named_parameters()) / 1e6


def accuracy(output, target):
    _, pred = output.topk(2, 1, True, True)
    correct = pred.t().eq(target.view(1, -1).expand_as(pred.t()))
    return correct[:2].view(-1).float().sum(0) * (100.0 / target.size(0))


def batches(count, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (args.batch_size, 3, args.image_size, args.image_size)
    for _ in range(count):
        images = torch.randn(*shape, generator=generator)
        yield images, torch.randint(0, 4, shape[:1], generator=generator)


def drop(switches, alphas, k):
    for row, probability in zip(switches, F.softmax(alphas, dim=-1).tolist()):
        alive = [i for i, s in enumerate(row) if s]
        for i in sorted(range(len(alive)), key=lambda i: probability[i])[:k]:
            row[alive[i]] = False


def main():
    if not torch.cuda.is_available():
        logging.info("no gpu device available")
        sys.exit(1)
    torch.cuda.set_device(0)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.cuda.manual_seed(args.seed)
    criterion = nn.CrossEntropyLoss().cuda()
    rates = [float(rate) for rate in args.dropout_rate] or [0.0, 0.5]
    layers = [int(count) for count in args.add_layers] or [0, 1]
    edges = sum(2 + i for i in range(args.nodes))
    normal = [[True] * len(PRIMITIVES) for _ in range(edges)]
    reduce = [[True] * len(PRIMITIVES) for _ in range(edges)]
    losses = []
    for stage, (rate, add) in enumerate(zip(rates, layers)):
        model = Network(
            args.init_channels,
            4,
            3 + add,
            criterion,
            steps=args.nodes,
            multiplier=args.nodes,
            switches_normal=normal,
            switches_reduce=reduce,
            p=rate,
        )
        model = nn.DataParallel(model).cuda()
        logging.info("param size = %fMB", parameters_in_MB(model))
        losses += train(model, criterion, rate, stage)
        for switches, alphas in zip((normal, reduce), model.module.arch_parameters()):
            drop(switches, alphas.data.cpu(), 3)
            logging.info("switches = %s", switches)
        utils.save(model, os.path.join(args.save, "weights.pt"))
    alphas = [a.tolist() for a in model.module.arch_parameters()]
    genes = [[(PRIMITIVES[row.index(True)], j) for j, row in enumerate(normal[:2])]] * 2
    logging.info("genotype = %s", Genotype(genes[0], [2], genes[1], [2]))
    with open(os.path.join(args.save, "result.json"), "w") as file:
        json.dump({"losses": losses, "alphas": alphas, "switches": [normal, reduce]}, file)


def train(model, criterion, rate, stage):
    network = model.module
    weights = [v for name, v in model.named_parameters() if "alphas" not in name]
    optimizer = torch.optim.SGD(weights, args.learning_rate, momentum=0.9, weight_decay=3e-4)
    optimizer_a = torch.optim.Adam(
        network.arch_parameters(), args.arch_learning_rate, betas=(0.5, 0.999), weight_decay=1e-3
    )
    losses = []
    for epoch in range(args.epochs):
        network.p = rate * (args.epochs - epoch - 1) / args.epochs if epoch else rate
        network.update_p()
        objs, top2 = utils.AvgrageMeter(), utils.AvgrageMeter()
        model.train()
        feed = zip(batches(args.steps, 10 * stage + epoch), batches(args.steps, 99 + epoch))
        for (input, target), (input_search, target_search) in feed:
            input, target = input.cuda(), target.cuda(non_blocking=True)
            input_search, target_search = input_search.cuda(), target_search.cuda()
            if epoch > 0:
                optimizer_a.zero_grad()
                criterion(model(input_search), target_search).backward()
                nn.utils.clip_grad_norm_(network.arch_parameters(), 5.0)
                optimizer_a.step()
            optimizer.zero_grad()
            logits = model(input)
            loss = criterion(logits, target)
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 5.0)
            optimizer.step()
            objs.update(loss.data.item(), input.size(0))
            top2.update(accuracy(logits, target).item(), input.size(0))
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            for input, target in batches(1, 7):
                losses.append(criterion(model(input.cuda()), target.cuda()).item())
        logging.info("epoch %d loss %f top2 %f", epoch, objs.avg, top2.avg)
    return losses


if __name__ == "__main__":
    main()
