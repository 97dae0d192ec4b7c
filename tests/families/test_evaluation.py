"""Evaluation mode for the time of a block."""

import pytest
from torch import nn

from ofb_hf.families.evaluation import evaluating


def test_models_are_evaluated_inside_and_as_before_afterwards():
    trained = nn.Sequential(nn.Dropout()).train()
    evaluated = nn.Sequential(nn.Dropout()).eval()
    with evaluating(trained, evaluated):
        assert not trained.training
        assert not trained[0].training
        assert not evaluated.training
    assert trained.training
    assert trained[0].training
    assert not evaluated[0].training


def test_an_error_inside_does_not_leave_a_model_in_evaluation_mode():
    model = nn.Dropout().train()
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert model.training
