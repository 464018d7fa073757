"""Networks over sequences: recurrent layers and cells, scans, temporal convolutions, embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import rnn

from constructs.registry import construct, image, indices, normal, signal, tokens

TOKENS = tokens(6, 5)
INDICES = indices(6, 12)


class Sequence(nn.Module):
    """A recurrent layer between two linear ones; every step goes on."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(5, 7), layer, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(torch.tanh(self.embed(x)))
        return self.head(out)


class LastState(nn.Module):
    """The last hidden state of the top layer, in one of several ways."""

    def __init__(self, layer: nn.RNNBase, how: str) -> None:
        super().__init__()
        self.embed, self.rnn, self.how = nn.Linear(5, 7), layer, how
        self.head = nn.Linear(layer.hidden_size * (2 if how == "both" else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.rnn(F.relu(self.embed(x)))
        if self.how == "output":
            return self.head(out[:, -1, :])
        hidden = state[0] if isinstance(state, tuple) else state
        if self.how == "both":
            return self.head(torch.cat((hidden[-2], hidden[-1]), dim=1))
        return self.head(hidden[-1])


class InitialState(nn.Module):
    """States made of zeros, as in the tutorials."""

    def __init__(self, hidden: int = 8, num_layers: int = 2) -> None:
        super().__init__()
        self.hidden, self.num_layers = hidden, num_layers
        self.lstm = nn.LSTM(5, hidden, num_layers, batch_first=True)
        self.fc = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        h0 = torch.zeros(self.num_layers, x.size(0), self.hidden, dtype=x.dtype, device=x.device)
        c0 = torch.zeros(self.num_layers, x.size(0), self.hidden, dtype=x.dtype, device=x.device)
        out, _ = self.lstm(x, (h0, c0))
        return self.fc(out[:, -1])


class LearnedState(nn.Module):
    """States are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.h0 = nn.Parameter(torch.randn(1, 1, 8))
        self.gru, self.fc = nn.GRU(5, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gru(x, self.h0.expand(-1, len(x), -1).contiguous())[0])


class StateFromInput(nn.Module):
    """Image captioning: the state is made by a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.init_h, self.init_c = nn.Conv2d(3, 6, 3), nn.Linear(6, 8), nn.Linear(6, 8)
        self.embed, self.lstm, self.fc = nn.Embedding(12, 5), nn.LSTM(5, 8, batch_first=True), nn.Linear(8, 12)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        features = F.relu(self.conv(x)).mean((2, 3))
        state = self.init_h(features).unsqueeze(0), self.init_c(features).unsqueeze(0)
        return self.fc(self.lstm(self.embed(words), state)[0])


class Packed(nn.Module):
    """Packed sequences."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(5, 7), layer, nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = rnn.pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
        out, _ = rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.size(1))
        return self.head(out)


class SequenceFirst(nn.Module):
    """batch_first=False after a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gru, self.head = nn.Conv1d(3, 7, 3), nn.GRU(7, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, hidden = self.gru(F.relu(self.conv(x)).permute(2, 0, 1))
        return self.head(out.mean(0) + hidden[0])


class CRNN(nn.Module):
    """Columns of an image are steps; height times channels written as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=(2, 1), padding=1)
        self.rnn, self.fc = nn.LSTM(4 * 4, 6, bidirectional=True, batch_first=True), nn.Linear(2 * 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).permute(0, 3, 1, 2).reshape(x.size(0), -1, 4 * 4)
        return F.log_softmax(self.fc(self.rnn(x)[0]), dim=-1)


def layer(kind: Callable[..., nn.RNNBase], **options: Any) -> Callable[[], nn.RNNBase]:
    return lambda: kind(7, 8, **{"batch_first": True} | options)


def lengths(batch: int) -> tuple[Tensor, Tensor]:
    return normal(batch, 6, 5), 6 - torch.arange(batch) % 5


LAYERS: dict[str, tuple[Callable[[], nn.RNNBase], int]] = {
    "lstm": (layer(nn.LSTM), 8),
    "lstm_no_bias": (layer(nn.LSTM, bias=False), 8),
    "lstm_two_layers": (layer(nn.LSTM, num_layers=2), 8),
    "lstm_bidirectional": (layer(nn.LSTM, bidirectional=True), 16),
    "lstm_projected": (layer(nn.LSTM, proj_size=4), 4),
    "lstm_projected_two_ways": (layer(nn.LSTM, proj_size=4, num_layers=2, bidirectional=True), 8),
    "gru": (layer(nn.GRU), 8),
    "gru_two_layers": (layer(nn.GRU, num_layers=2), 8),
    "gru_bidirectional_two_layers": (layer(nn.GRU, num_layers=2, bidirectional=True), 16),
    "rnn_tanh": (layer(nn.RNN), 8),
    "rnn_relu": (layer(nn.RNN, nonlinearity="relu", num_layers=2), 8),
    "rnn_bidirectional": (layer(nn.RNN, bidirectional=True), 16),
}
for _name, (_layer, _width) in LAYERS.items():
    construct(_name, lambda make=_layer, width=_width: Sequence(make(), width), TOKENS)
construct("lstm_last_output", lambda: LastState(layer(nn.LSTM)(), "output"), TOKENS)
construct("lstm_last_state", lambda: LastState(layer(nn.LSTM, num_layers=2)(), "state"), TOKENS)
construct("gru_last_state", lambda: LastState(layer(nn.GRU)(), "state"), TOKENS)
construct("gru_last_states_both_ways", lambda: LastState(layer(nn.GRU, bidirectional=True)(), "both"), TOKENS)
construct("lstm_zero_state", InitialState, TOKENS)
construct("gru_learned_state", LearnedState, TOKENS)
construct("lstm_state_from_input", StateFromInput, lambda batch: (image()(batch), INDICES(batch)))
construct("gru_packed", lambda: Packed(layer(nn.GRU)()), lengths)
construct("lstm_packed", lambda: Packed(layer(nn.LSTM)()), lengths)
construct("gru_sequence_first", SequenceFirst, signal(3, 8))
construct("lstm_of_image_columns", CRNN, image(3, 8))


# Cells in a loop, gates by hand


class CellLoop(nn.Module):
    """A cell of torch in a Python loop."""

    def __init__(self, cell: nn.RNNCellBase, hidden: int = 8) -> None:
        super().__init__()
        self.embed, self.cell, self.hidden, self.head = nn.Linear(5, 7), cell, hidden, nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, outs = torch.tanh(self.embed(x)), []
        h = c = torch.zeros(x.size(0), self.hidden, dtype=x.dtype)
        for t in range(x.size(1)):
            if isinstance(self.cell, nn.LSTMCell):
                h, c = self.cell(x[:, t], (h, c))
            else:
                h = self.cell(x[:, t], h)
            outs.append(h)
        return self.head(torch.stack(outs, dim=1))


class ElmanByHand(nn.Module):
    """PyTorch's tutorial of names: input and hidden side by side."""

    def __init__(self, hidden_size: int = 8) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.i2h, self.i2o = nn.Linear(5 + hidden_size, hidden_size), nn.Linear(5 + hidden_size, 6)
        self.o2o = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(x.size(0), self.hidden_size)
        for step in x.unbind(1):
            combined = torch.cat((step, hidden), 1)
            hidden, output = torch.tanh(self.i2h(combined)), self.i2o(combined)
        return F.log_softmax(self.o2o(output), dim=1)


class LSTMByHand(nn.Module):
    """Four gates from one layer, taken apart in one of several ways."""

    def __init__(self, take: str, hidden: int = 8) -> None:
        super().__init__()
        self.take, self.hidden = take, hidden
        self.x2h, self.h2h = nn.Linear(5, 4 * hidden), nn.Linear(hidden, 4 * hidden, bias=False)
        self.head = nn.Linear(hidden, 3)

    def gates(self, z: Tensor) -> Any:
        if self.take == "chunk":
            return z.chunk(4, 1)
        if self.take == "split":
            return torch.split(z, self.hidden, dim=1)
        if self.take == "view":
            return z.view(-1, 4, self.hidden).unbind(1)
        H = self.hidden
        return z[:, :H], z[:, H : 2 * H], z[:, 2 * H : 3 * H], z[:, 3 * H :]

    def forward(self, x: Tensor) -> Tensor:
        h, c = torch.zeros(len(x), self.hidden).to(x), torch.zeros(len(x), self.hidden).to(x)
        for t in range(x.size(1)):
            i, f, g, o = self.gates(self.x2h(x[:, t]) + self.h2h(h))
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.head(h)


class GRUByHand(nn.Module):
    """A layer per gate."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.hidden = hidden
        self.Wz, self.Wr, self.Wh = (nn.Linear(5 + hidden, hidden) for _ in range(3))
        self.head = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(0), self.hidden, dtype=x.dtype)
        for t in range(x.size(1)):
            both = torch.cat([x[:, t], h], -1)
            z, r = torch.sigmoid(self.Wz(both)), torch.sigmoid(self.Wr(both))
            candidate = torch.tanh(self.Wh(torch.cat([x[:, t], r * h], -1)))
            h = (1 - z) * h + z * candidate
        return self.head(h)


class RawWeights(nn.Module):
    """A cell of bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w_ih, self.w_hh = nn.Parameter(torch.randn(5, 8) / 2), nn.Parameter(torch.randn(8, 8) / 3)
        self.b, self.head = nn.Parameter(torch.zeros(8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, outs = torch.zeros_like(x[:, 0] @ self.w_ih), []
        for step in x.transpose(0, 1):
            h = torch.tanh(torch.addmm(self.b, step, self.w_ih) + h @ self.w_hh)
            outs.append(h)
        return self.head(torch.stack(outs)).transpose(0, 1)


class OutputInBuffer(nn.Module):
    """Steps are written into a tensor made beforehand."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.hidden, self.cell, self.head = hidden, nn.GRUCell(5, hidden), nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(x.size(0), x.size(1), self.hidden, dtype=x.dtype)
        h = None
        for t in range(x.size(1)):
            h = self.cell(x[:, t], h)
            out[:, t] = h
        return self.head(out)


class ConvLSTM(nn.Module):
    """Shi et al.: gates are channels of one convolution."""

    def __init__(self, hidden_dim: int = 4) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.conv = nn.Conv2d(3 + hidden_dim, 4 * hidden_dim, 3, padding=1)
        self.out = nn.Conv2d(hidden_dim, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, steps, _, height, width = x.shape
        h = torch.zeros(b, self.hidden_dim, height, width, dtype=x.dtype, device=self.conv.weight.device)
        c = torch.zeros_like(h)
        for t in range(steps):
            cc_i, cc_f, cc_o, cc_g = torch.split(self.conv(torch.cat([x[:, t], h], 1)), self.hidden_dim, dim=1)
            c = torch.sigmoid(cc_f) * c + torch.sigmoid(cc_i) * torch.tanh(cc_g)
            h = torch.sigmoid(cc_o) * torch.tanh(c)
        return self.out(h)


class AutoRegressive(nn.Module):
    """What comes out goes in again."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.cell, self.out = nn.LSTM(5, 8, batch_first=True), nn.LSTMCell(5, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, c) = self.encoder(x)
        h, c, step, outs = h[0], c[0], x[:, -1], []
        for _ in range(3):
            h, c = self.cell(step, (h, c))
            step = self.out(h)
            outs += [step]
        return torch.stack(outs, 1)


construct("cell_rnn_loop", lambda: CellLoop(nn.RNNCell(7, 8, nonlinearity="relu")), TOKENS)
construct("cell_gru_loop", lambda: CellLoop(nn.GRUCell(7, 8)), TOKENS)
construct("cell_lstm_loop", lambda: CellLoop(nn.LSTMCell(7, 8)), TOKENS)
construct("cell_lstm_loop_no_bias", lambda: CellLoop(nn.LSTMCell(7, 8, bias=False)), TOKENS)
construct("cell_elman_by_hand", ElmanByHand, TOKENS)
for _take in ("chunk", "split", "view", "slices"):
    construct(f"cell_lstm_by_hand_{_take}", lambda take=_take: LSTMByHand(take), TOKENS)
construct("cell_gru_by_hand", GRUByHand, TOKENS)
construct("cell_parameters", RawWeights, TOKENS)
construct("cell_writes_into_buffer", OutputInBuffer, TOKENS)
construct("cell_conv_lstm", ConvLSTM, lambda batch: normal(batch, 3, 3, 6, 6))
construct("cell_autoregressive", AutoRegressive, TOKENS)


# Scans


class Sequential(nn.Sequential):
    """A block of tokens between two linear layers."""

    def __init__(self, block: nn.Module, dim: int = 8) -> None:
        super().__init__(nn.Linear(5, dim), nn.SiLU(), block, nn.Linear(dim, 3))


class DiagonalScan(nn.Module):
    """A diagonal linear recurrence, step by step."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.randn(dim))
        self.inp, self.gate, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        a, u = torch.sigmoid(self.decay), self.inp(x)
        h, states = torch.zeros_like(u[:, 0]), []
        for t in range(x.size(1)):
            h = a * h + (1 - a) * u[:, t]
            states.append(h)
        return x + self.out(torch.stack(states, 1) * F.silu(self.gate(x)))


class CumulativeScan(nn.Module):
    """minGRU-like: a scan in closed form with cumsum."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.z, self.h, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        log_a = F.logsigmoid(self.z(x)).cumsum(1)
        h = torch.cumsum(self.h(x) * torch.exp(-log_a), dim=1) * torch.exp(log_a)
        return self.out(h)


class Mamba(nn.Module):
    """A selective scan: steps, B and C from one layer, a convolution before, a gate behind."""

    def __init__(self, dim: int = 8, d_inner: int = 12, d_state: int = 4, dt_rank: int = 2) -> None:
        super().__init__()
        self.d_inner, self.d_state, self.dt_rank = d_inner, d_state, dt_rank
        self.in_proj, self.out_proj = nn.Linear(dim, 2 * d_inner, bias=False), nn.Linear(d_inner, dim, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, 3, groups=d_inner, padding=2)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, d_state + 1).float().repeat(d_inner, 1)))
        self.D = nn.Parameter(torch.ones(d_inner))

    def forward(self, x: Tensor) -> Tensor:
        _, length, _ = x.shape
        x, res = self.in_proj(x).split(split_size=[self.d_inner, self.d_inner], dim=-1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[:, :, :length]).transpose(1, 2)
        delta, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta, A = F.softplus(self.dt_proj(delta)), -torch.exp(self.A_log)
        dA = torch.exp(torch.einsum("bld,dn->bldn", delta, A))
        dBu = torch.einsum("bld,bln,bld->bldn", delta, B, x)
        state, ys = torch.zeros(len(x), self.d_inner, self.d_state, dtype=x.dtype), []
        for i in range(length):
            state = dA[:, i] * state + dBu[:, i]
            ys.append(torch.einsum("bdn,bn->bd", state, C[:, i]))
        y = torch.stack(ys, dim=1) + x * self.D
        return self.out_proj(y * F.silu(res))


class DiagonalSSM(nn.Module):
    """S4D: a kernel per channel, applied by FFT."""

    def __init__(self, dim: int = 8, state: int = 4) -> None:
        super().__init__()
        self.log_dt, self.D = nn.Parameter(torch.rand(dim) - 3), nn.Parameter(torch.randn(dim))
        self.log_A, self.C = nn.Parameter(torch.rand(dim, state)), nn.Parameter(torch.randn(dim, state))

    def forward(self, x: Tensor) -> Tensor:
        u, length = x.transpose(1, 2), x.size(1)
        dtA = -torch.exp(self.log_A) * self.log_dt.exp().unsqueeze(-1)
        K = torch.einsum("hn,hnl->hl", self.C, torch.exp(dtA.unsqueeze(-1) * torch.arange(length)))
        y = torch.fft.irfft(torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(K, n=2 * length), n=2 * length)
        return (F.gelu(y[..., :length] + u * self.D.unsqueeze(-1))).transpose(1, 2)


class RWKV(nn.Module):
    """Time mixing: the step before, exponents that decay, a receptance gate."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.time_decay, self.time_first = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(dim))
        self.mix = nn.Parameter(torch.rand(3, 1, 1, dim))
        self.shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.key, self.value, self.receptance, self.output = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        before = self.shift(x)
        k, v, r = (
            f(x * m + before * (1 - m)) for f, m in zip((self.key, self.value, self.receptance), self.mix, strict=True)
        )
        num = den = torch.zeros_like(k[:, 0])
        w, outs = torch.exp(-torch.exp(self.time_decay)), []
        for t in range(x.size(1)):
            now = torch.exp(self.time_first + k[:, t])
            outs.append((num + now * v[:, t]) / (den + now))
            num, den = w * num + torch.exp(k[:, t]) * v[:, t], w * den + torch.exp(k[:, t])
        return self.output(torch.sigmoid(r) * torch.stack(outs, 1))


class SimpleRecurrentUnit(nn.Module):
    """SRU: all matrices before the loop, three of them in one."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.W, self.v = nn.Linear(dim, 3 * dim), nn.Parameter(torch.randn(2, dim))

    def forward(self, x: Tensor) -> Tensor:
        u, f, r = self.W(x).chunk(3, dim=-1)
        c, outs = torch.zeros_like(x[:, 0]), []
        for t in range(x.size(1)):
            forget = torch.sigmoid(f[:, t] + self.v[0] * c)
            c = forget * c + (1 - forget) * u[:, t]
            reset = torch.sigmoid(r[:, t] + self.v[1] * c)
            outs.append(reset * c + (1 - reset) * x[:, t])
        return torch.stack(outs, dim=1)


construct("scan_diagonal", lambda: Sequential(DiagonalScan()), TOKENS)
construct("scan_cumsum", lambda: Sequential(CumulativeScan()), TOKENS)
construct("scan_mamba", lambda: Sequential(Mamba()), TOKENS)
construct("scan_s4d", lambda: Sequential(DiagonalSSM()), TOKENS)
construct("scan_rwkv", lambda: Sequential(RWKV()), TOKENS)
construct("scan_sru", lambda: Sequential(SimpleRecurrentUnit()), TOKENS)


# Temporal convolutions


class Chomp(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.size].contiguous()


class TemporalBlock(nn.Module):
    """TCN: dilated, causal by cutting the end, a residual."""

    def __init__(self, n_in: int, n_out: int, dilation: int) -> None:
        super().__init__()
        pad = 2 * dilation
        self.net = nn.Sequential(
            *(nn.Conv1d(n_in, n_out, 3, padding=pad, dilation=dilation), Chomp(pad), nn.ReLU(), nn.Dropout(0.0)),
            *(nn.Conv1d(n_out, n_out, 3, padding=pad, dilation=dilation), Chomp(pad), nn.ReLU(), nn.Dropout(0.0)),
        )
        self.downsample = nn.Conv1d(n_in, n_out, 1) if n_in != n_out else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        res = x if self.downsample is None else self.downsample(x)
        return self.relu(self.net(x) + res)


class TCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tcn, self.linear = nn.Sequential(TemporalBlock(3, 8, 1), TemporalBlock(8, 8, 2)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.tcn(x)[:, :, -1])


class WaveNetBlock(nn.Module):
    """A gated dilated convolution with a skip and a residual way."""

    def __init__(self, channels: int = 8, dilation: int = 2, fused: bool = False) -> None:
        super().__init__()
        self.fused, self.left = fused, dilation
        self.filter = nn.Conv1d(channels, channels * (1 + fused), 2, dilation=dilation)
        if not fused:
            self.gate = nn.Conv1d(channels, channels, 2, dilation=dilation)
        self.res, self.skip = nn.Conv1d(channels, channels, 1), nn.Conv1d(channels, 6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        padded = F.pad(x, (self.left, 0))
        a, b = self.filter(padded).chunk(2, 1) if self.fused else (self.filter(padded), self.gate(padded))
        z = torch.tanh(a) * torch.sigmoid(b)
        return x + self.res(z), self.skip(z)


class GatedStack(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.enter = nn.Conv1d(3, 8, 1)
        self.blocks = nn.ModuleList([WaveNetBlock(8, 2**i, fused) for i in range(2)])
        self.out = nn.Conv1d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.enter(x), 0
        for block in self.blocks:
            x, skip = block(x)
            skips = skips + skip
        return self.out(F.relu(skips))


class QRNN(nn.Module):
    """Gates from a causal convolution, pooled in a loop."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv1d(3, 3 * hidden, 2, padding=1), nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        z, f, o = self.conv(x)[:, :, : x.size(2)].chunk(3, dim=1)
        z, f, o, c = z.tanh(), f.sigmoid(), o.sigmoid(), 0
        for t in range(x.size(2)):
            c = f[:, :, t] * c + (1 - f[:, :, t]) * z[:, :, t]
        return self.fc(o[:, :, -1] * c)


construct("temporal_tcn", TCN, signal(3, 8))
construct("temporal_wavenet", lambda: GatedStack(False), signal(3, 8))
construct("temporal_wavenet_fused", lambda: GatedStack(True), signal(3, 8))
construct("temporal_qrnn", QRNN, signal(3, 8))


# Embeddings and positions


class Words(nn.Module):
    """An embedding, something on top, a mean over the words."""

    def __init__(self, top: Callable[[Tensor], Tensor] | nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        self.embed, self.top = nn.Embedding(12, 8, **options), top or nn.Identity()
        self.fc1, self.fc2 = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(self.top(self.embed(x)).mean(1))))


class PositionalParameter(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.randn(1, 10, dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.pos[:, : x.size(1)])


class PositionalEmbedding(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.pos = nn.Embedding(10, dim)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.pos(torch.arange(x.size(1), device=x.device)))


class PositionalEncoding(nn.Module):
    """PyTorch's tutorial: a sinusoidal buffer."""

    def __init__(self, d_model: int = 8, max_len: int = 10) -> None:
        super().__init__()
        self.d_model = d_model
        position = torch.arange(max_len).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        pe = torch.zeros(1, max_len, d_model)
        pe[0, :, 0::2], pe[0, :, 1::2] = torch.sin(position * div_term), torch.cos(position * div_term)
        self.register_buffer("pe", pe)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * math.sqrt(self.d_model) + self.pe[:, : x.size(1)])


class SinusoidsInForward(nn.Module):
    """Made anew each time, as wide as a layer asks for."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.proj, self.dim = nn.Linear(dim, dim), dim

    def forward(self, x: Tensor) -> Tensor:
        half = self.dim // 2
        freq = torch.exp(-math.log(100.0) * torch.arange(half, dtype=x.dtype) / half)
        args = torch.arange(x.size(1), dtype=x.dtype)[:, None] * freq[None]
        return x + self.proj(torch.cat([torch.cos(args), torch.sin(args)], dim=-1))


class Bag(nn.Module):
    """Text classification with offsets."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag, self.fc = nn.EmbeddingBag(12, 8, mode=mode), nn.Linear(8, 3)

    def forward(self, text: Tensor, offsets: Tensor) -> Tensor:
        return self.fc(self.bag(text, offsets))


class BagOfRows(nn.Module):
    """A fixed number of words in each row."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.fc = nn.EmbeddingBag(12, 8, mode="sum"), nn.Linear(8, 3)

    def forward(self, text: Tensor, weights: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.bag(text, per_sample_weights=weights)))


class TiedHead(nn.Module):
    """The output layer is the embedding; a hidden projection between."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed, self.rnn, self.project = nn.Embedding(12, 8), nn.GRU(8, 10, batch_first=True), nn.Linear(10, 8)
        if how == "module":
            self.head = nn.Linear(8, 12, bias=False)
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.project(self.rnn(self.embed(x))[0])
        if self.how == "module":
            return self.head(h)
        return F.linear(h, self.embed.weight) if self.how == "linear" else h @ self.embed.weight.t()


class SkipGram(nn.Module):
    """Two embeddings, a dot product of each pair."""

    def __init__(self) -> None:
        super().__init__()
        self.center, self.context = nn.Embedding(12, 8), nn.Embedding(12, 8)

    def forward(self, center: Tensor, context: Tensor) -> Tensor:
        v, u = self.center(center[:, :1]), self.context(context)
        return torch.bmm(u, v.transpose(1, 2)).squeeze(2)


class TokenTypes(nn.Module):
    """BERT: words, positions and types are added and normed."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.word, self.position, self.kind = nn.Embedding(12, 8, padding_idx=0), nn.Embedding(6, 8), nn.Embedding(2, 8)
        self.register_buffer("position_ids", torch.arange(6).unsqueeze(0), persistent=False)
        self.norm = nn.LayerNorm(8) if norm else nn.Identity()
        self.fc1, self.fc2 = nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        ids = self.position_ids[:, : input_ids.size(1)]
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = self.norm(self.word(input_ids) + self.position(ids) + self.kind(types))
        return self.fc2(F.gelu(self.fc1(x)))


class TextCNN(nn.Module):
    """Kim, 2014: kernels as wide as the embedding, a maximum over time, all side by side."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, dim)
        self.convs = nn.ModuleList([nn.Conv2d(1, 5, (k, dim)) for k in (2, 3)])
        self.fc = nn.Linear(2 * 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).unsqueeze(1)
        x = [F.relu(conv(x)).squeeze(3) for conv in self.convs]
        return self.fc(torch.cat([F.max_pool1d(i, i.size(2)).squeeze(2) for i in x], 1))


class OneHot(nn.Module):
    """One-hot rows times a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Parameter(torch.randn(12, 8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.one_hot(x, 12).to(self.table.dtype) @ self.table)


class Factorised(nn.Module):
    """ALBERT: a narrow embedding and a layer that widens it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.widen, self.fc = nn.Embedding(12, 4), nn.Linear(4, 10, bias=False), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.widen(self.embed(x))))


def bags(batch: int) -> tuple[Tensor, Tensor]:
    return torch.arange(3 * batch) % 12, 3 * torch.arange(batch)


construct("embedding_words", Words, INDICES)
construct("embedding_padding", lambda: Words(padding_idx=0), INDICES)
construct("embedding_one_hot", OneHot, INDICES)
construct("embedding_factorised", Factorised, INDICES)
construct("embedding_position_parameter", lambda: Words(PositionalParameter()), INDICES)
construct("embedding_position_embedding", lambda: Words(PositionalEmbedding()), INDICES)
construct("embedding_sinusoids_buffer", lambda: Words(PositionalEncoding()), INDICES)
construct("embedding_sinusoids_in_forward", lambda: Words(SinusoidsInForward()), INDICES)
construct("embedding_types_added", lambda: TokenTypes(False), lambda batch: {"input_ids": INDICES(batch)})
construct("embedding_types_normed", lambda: TokenTypes(True), lambda batch: (INDICES(batch), INDICES(batch) % 2))
for _mode in ("mean", "sum", "max"):
    construct(f"embedding_bag_{_mode}", lambda mode=_mode: Bag(mode), bags)
construct("embedding_bag_weighted", BagOfRows, lambda batch: (INDICES(batch), normal(batch, 6)))
for _how in ("module", "linear", "matmul"):
    construct(f"embedding_tied_{_how}", lambda how=_how: TiedHead(how), INDICES)
construct("embedding_skip_gram", SkipGram, lambda batch: (INDICES(batch), INDICES(batch)))
construct("embedding_text_cnn", TextCNN, INDICES)
