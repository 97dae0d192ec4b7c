"""A search that begins with the network in an equivalent basis: units are those of the rewritten
network, on all ranks, and after a resumption as well."""

from dataclasses import replace

import pytest
import torch
from factories import FAMILIES, search_config, tiny_images, tiny_model
from invariants import assert_equal_states
from runs import arguments, finish, results, rows, searcher, start_search
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from ofb_hf import OFBTrainer, count_macs, install_bi_masks
from ofb_hf.pruning.equivalent_basis import equivalent_basis
from ofb_hf.pruning.surgery import slice_model
from ofb_hf.search import rewriting
from ofb_hf.search.rewriting import BASIS_IMAGES, BATCH, images_for_basis, rewritten

BASES = ("heads", "equivalent")


def shapes(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def logits(model, images):
    with torch.no_grad():
        return model.eval()(images).logits


@pytest.mark.slow
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_search_cuts_the_rewritten_network(tmp_path, family, basis):
    given = tiny_model(family).train()
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    trainer = searcher(
        tmp_path, search_config(family, target_macs=0.6, basis=basis), given, family=family
    )
    assert trainer.supernet.training
    dense, images = trainer.rewritten_dense, tiny_images(4)
    assert_equal_states(before, given.state_dict())
    trainer.train()
    small, subnet = trainer.compress(), trainer.read_subnet()
    assert count_macs(small) <= 0.6 * count_macs(given)
    assert (subnet.basis, dense.config.basis, small.config.basis) == (basis,) * 3
    assert shapes(slice_model(dense, subnet)) == shapes(small)
    assert (logits(dense, images) - logits(given, images)).abs().max() < 1e-4
    # They are other weights: the indices mean nothing in the given network.
    with pytest.raises(ValueError, match=rf"counts units .* basis '{basis}', but .* basis None"):
        slice_model(given, subnet)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 12, 20])
def test_a_resumed_search_keeps_its_basis(tmp_path, monkeypatch, stop):
    """Stopped while it observes, decides, and recovers; resumed where other images, or another
    machine, would give another basis."""
    config = search_config(target_macs=0.6, basis="equivalent")
    straight = searcher(tmp_path / "straight", config)
    straight.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == stop
            return control

    settings = {"save_strategy": "steps", "save_steps": stop}
    searcher(tmp_path / "cut", config, callbacks=[Stop()], **settings).train()
    monkeypatch.setattr(rewriting, "images_for_basis", lambda *args: [tiny_images(4, seed=9)])
    resumed = searcher(tmp_path / "cut", config, **settings)
    found = {name: tensor.clone() for name, tensor in resumed.rewritten_dense.state_dict().items()}
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    dense = resumed.rewritten_dense.state_dict()
    assert any(not torch.equal(dense[name], tensor) for name, tensor in found.items())
    assert_equal_states(straight.rewritten_dense.state_dict(), dense)
    assert resumed.read_subnet() == straight.read_subnet()
    assert_equal_states(straight.supernet.state_dict(), resumed.supernet.state_dict())


@pytest.mark.slow
def test_a_checkpoint_of_another_basis_is_refused(tmp_path):
    searcher(tmp_path, save_strategy="steps", save_steps=4, max_steps=4).train()
    other = searcher(tmp_path, search_config(target_macs=0.6, basis="heads"), max_steps=4)
    with pytest.raises(ValueError, match=r"another search.*basis.*given.*heads"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "source"), [("vit", "error_curves"), ("swin", "gradients")])
def test_two_ranks_search_in_one_basis(tmp_path, family, source):
    options = {
        "family": family,
        "config": {"basis": "equivalent", "importance_source": source},
        "arguments": {"max_steps": 12, "per_device_train_batch_size": 4},
        "compare_ranks": True,
    }
    status, said = finish(start_search(tmp_path, options, ranks=2))
    assert status == 0, said[-3000:]
    first, second = results(tmp_path, ranks=2)
    assert [step["different"] for step in first["steps"]] == [[]] * 12
    assert first["weights"] == second["weights"]
    assert first["subnet"] == second["subnet"]
    assert first["subnet"]["basis"] == "equivalent"


# ------------------------------------------------------------------------------------------- images


class Rows(IterableDataset):
    """The same rows, one after the other."""

    def __iter__(self):
        return iter(rows(40))


class Stream:
    """The same rows, from a loader of its own."""

    def __len__(self):
        return 20

    def loader(self, batch_size):
        images = torch.stack([row["pixel_values"] for row in rows(20)])
        return [{"pixel_values": part} for part in images.split(batch_size)]


def test_images_are_those_of_any_data_set(tmp_path):
    first, other = (arguments(tmp_path, seed=seed) for seed in (0, 1))
    everything = torch.stack([row["pixel_values"] for row in rows(40)])
    by_index = list(images_for_basis(rows(40), first))
    assert [len(batch) for batch in by_index] == [BATCH, 8]
    # all of them, in an order that follows from the seed alone
    assert set(map(float, torch.cat(by_index).sum((1, 2, 3)))) == set(
        map(float, everything.sum((1, 2, 3)))
    )
    assert torch.equal(torch.cat(by_index), torch.cat([*images_for_basis(rows(40), first)]))
    assert not torch.equal(torch.cat(by_index), torch.cat([*images_for_basis(rows(40), other)]))
    assert sum(map(len, images_for_basis(rows(300), first))) == BASIS_IMAGES
    assert torch.equal(torch.cat([*images_for_basis(Rows(), first)]), everything)
    assert torch.equal(torch.cat([*images_for_basis(Stream(), first)]), everything[:20])


def test_images_are_prepared_as_in_training(tmp_path):
    args = arguments(tmp_path)

    def brighter(images, labels, generator):
        assert len(labels) == len(images)
        return images + torch.rand(1, generator=generator), labels

    first, second = (torch.cat([*images_for_basis(rows(8), args, brighter)]) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.cat([*images_for_basis(rows(8), args)]))


# ------------------------------------------------------------------------------------------ refused


def test_what_cannot_be_searched_is_refused_before_images_are_read(tmp_path):
    class Unread(list):
        def __getitem__(self, index):
            raise AssertionError("an image was read")

    args = arguments(tmp_path)
    config = search_config(target_macs=0.0001, basis="equivalent")
    with pytest.raises(ValueError, match="smallest"):
        rewriting.in_basis(tiny_model("vit"), config, args, train_dataset=Unread(rows()))
    with pytest.raises(ValueError, match=r"basis is 'heads', but there is no train_dataset"):
        rewriting.in_basis(tiny_model("vit"), search_config(basis="heads"), args)


def test_bi_masks_are_installed_on_a_network_in_the_basis_of_the_config():
    config = search_config(basis="equivalent")
    with pytest.raises(ValueError, match=r"basis is 'equivalent', but the model .* says None"):
        install_bi_masks(tiny_model("vit"), config)
    model = equivalent_basis(tiny_model("vit"), [tiny_images(8)])
    subnet = install_bi_masks(model, config).decisions.settle_()
    assert subnet.basis == "equivalent"
    # Whatever a network was before, it is given.
    given = install_bi_masks(model, replace(config, basis="given")).decisions.settle_()
    assert (given.kept, given.basis) == (subnet.kept, "given")
    assert shapes(slice_model(model, given)) == shapes(slice_model(model, subnet))


def test_a_network_that_is_searched_as_it_is_is_not_rewritten(tmp_path):
    assert searcher(tmp_path).rewritten_dense is None
    model = equivalent_basis(tiny_model("vit"), [tiny_images(8)])
    supernet = install_bi_masks(model, search_config(basis="equivalent"))
    trainer = OFBTrainer(supernet, arguments(tmp_path), train_dataset=rows())
    assert trainer.rewritten_dense is None
    assert trainer.read_subnet().basis == "equivalent"
    assert_equal_states(model.state_dict(), trainer.teacher.state_dict())


def test_the_mode_of_a_model_stays(tmp_path):
    for training in (True, False):
        model = tiny_model("vit").train(training)
        result = rewritten(model, [tiny_images(8)], "heads", arguments(tmp_path))
        assert result.training == model.training == training
        assert result.config.basis == "heads"
