"""Whether a model holds what its family's row speaks of, and no more."""

from transformers import PreTrainedModel

from billhook.errors import BillhookError
from billhook.families import attention, layers, linear, linears, mixture, row_of, shape


def check_known(model: PreTrainedModel) -> None:
    """Refuse a model whose layers hold more than its row speaks of: a cut would leave that as it is.

    Raises:
        BillhookError: names the first such parameter; or attention's sizes do not fit one another.
    """
    row, family = row_of(model), model.config.model_type
    for n in range(len(layers(model))):
        within = f"{row.layers}.{n}"
        known = {path for one in linears(model, n) for path in one.values()}
        if mixture(model, n) is not None:
            known |= {f"{within}.{name}" for name in (row.router, row.experts, f"{row.shared}_gate")}
        for name, param in layers(model)[n].named_parameters():
            path = f"{within}.{name}"
            if param.ndim > 1 and path.rpartition(".")[0] not in known:
                raise BillhookError(
                    f"{path} is nothing that billhook knows of {family}: a setting of its config adds it, and no cut would be right"
                )
        now, columns = attention(model, n), shape(linear(model, f"{within}.{row.attention}.{row.o}"))[1]
        if now.heads % now.kv_heads or columns != now.heads * now.value_dim:
            raise BillhookError(
                f"layer {n}: {now.heads} query heads of {now.head_dim} do not fit its other projections"
            )
