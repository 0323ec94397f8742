"""The types of ggml whose codes stand for numbers of a table: one number each (IQ4, MXFP4, NVFP4), or four or eight at once.

Those tables, codebooks, were chosen by trial, so no rule makes them. Each is some of all the words of four or eight levels, in
the order in which one counts them with the first weight as the lowest digit; what is kept here says which words those are.
Readers of single numbers are given their table, on the device of the blocks.
"""

from __future__ import annotations

import base64
import functools
import zlib

import torch
from torch import Tensor

from .blocks import Codes, Words, bits, groups, half, nibbles, one_by_one, pairs, signed

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice what they mean
# Of each codebook: the levels, how many of them are a word, and how many words there are.
BOOKS = {
    "IQ2_XXS": ((8, 25, 43), 8, 256),
    "IQ2_XS": ((8, 25, 43), 8, 512),
    "IQ2_S": ((8, 25, 43), 8, 1024),
    "IQ1": ((-8, 0, 8), 8, 2048),  # eighths
    "IQ3_XXS": ((4, 12, 20, 28, 36, 44, 52, 62), 4, 256),
    "IQ3_S": ((1, 3, 5, 7, 9, 11, 13, 15), 4, 512),
}
# A bit for every word of each, one after the other, the lowest bits first.
WORDS = (
    b"c-nPWO^h5z6@FDzp_+EEs+VrX;#AvShfX`PjBkWXwKXFd`_dCli@Q%Ipa^m1r`_y^ac_`f3j~5oyRnmTJ92^#$c!aN$|*z~K-"
    b"_Y$z=sI04@kLyj6`@<)jd74IIWr8o_h7(``)YXy{gK?AeZAb1s04!0szwxfClphkV&2TKmw*S97i$7Zw5fXOi6J(2<$}nv04(kCty<IH0A>%_@a#"
    b"#KEzFwOruGsCA+V6;T}$m$l&n%A*-%C)8;4P&XQBg`gx#Jl<Iyq>vTGq`8Wg&HXjEs!)!>2A%k@4V=&k|{94*+(g0mWN?-"
    b"^XBpHlL(kI1!<=A3m#Hz3j-2tN}YZlpR4wG!atk=c%N$oV!iS#hdg7k+dgJ;IR7Q^AkWV2ferdNt91C};=2-"
    b"14AIVT%ot$P^4BeGA!I&SE5sGq5|@yO4St&kkf<}==(`LNHQmgo62pQPc0%<?>&q!QUWn_{gnAOtca3Jrr$ghXb{CQ)+7zMT7kD~OKc(ja8S5oVT"
    b"8QA_s*QItXE_vthSCpKp~?c=g*;$At2uBQAA@VZ0o3<Arf@!C}#aTCX>WnN!2PDuLP$&^?xvbSmLfY{`ZUC1`BE@T*Ecq!=(Vxnw45fr%v*CtU~4"
    b"n;#q=QXwd2i|n)wIMU$o4f{X(<@DSQa2#i8VbW~Xx;Hc>J5_UE{D><$~GD0NJI1*7hGA(!@L8sk!aSpBOP)QGGjLjNmsjIqcB-cgPAQFy~a;H6g$"
    b"o~$u^z!Fk>ZSE*r#^yWFHV8X22rAlE?#hbx3_c9x<4BDdIDTe7*-LGOjZW_Q_4rg1*$mY_q;hrbBd6-"
    b"^#;KQ|oD10Dv*@hoTH`}l8y6T;bKn&o+bA47i>O#{o;FgIFA6U}orMv+<ZKytThV9`v`aySjJ9*v7UfGkK;#=%l@Fla>9V89(Eu^y+)h%jO&lCIZ"
    b"wOrK4|Y04S#VU}T8IxPuPQ?DGx7{!J`zu&s7vX3yN%}%%~8(X3H#}ti;ISj@o8@xl9hRlR)aOJsc2H-"
    b"?l+9N~*GH@a`^a%}_?3V@&hE@yyFXX^>f}qn{8H5hJ4H-"
    b"qY^9}}Gx3K)0gd7oSX*q6lC=Co|IYXxF2Bnp)szcgrxTYgFXykeV_6a|j`Pge<;=p4w@WW0ESK05nOCK^ZqHNWnjL4WFtNp}U=7uYiTy|P^QDonE"
    b"9Alr6Ltn1KHqDz1XAJ)k^O3zX*>CK!uTvek);R49lCI+(+Fx`Jbgc<!5|A!U`H5h!re~*O^0me5s%pL>5*6%aL8-=*6Ctl@spiK(l=T;qdVat4-"
    b"fWLR1YY|_SqqI?+w&p|P`x@WepQPi!I5B3ojaS033=&*T2(JVva@I#@#tM4;uz3Z+{S8ADDOAo56gx6=+2eqPW$o?o*XRimq+hK%a8tg^csyIQj2"
    b"Qol~h1-"
    b"{%_4UB6YHX%ldL##UdhzFf7$*vOU|Y1wFoaS?!i;hA<i>evt(<5%(5lQJ<qql+C4v#<vr(hwrDw1e*vVtl{hwo6(CURAnNrpAI;N96Ruosx|?&^}"
    b"Fg$yjWgu7vF=@6Eu$KE|hSts1M#t+7HzJGCKJ9?fw1N7T56i_xG#ubBQ{)tK%vWt@`j!P1L;m>-rxH3KWvX98^*7H%+{(i}H-Od~k31-"
    b"zQCdvJsURA2e|N41MnDjf02(Jh?davj;zV^7LOne*cpnE+2mTKVSXq{TH5YJ^p(Y$@am~-"
    b"B#RP94YU7w%mFAlY(7*>C&eQ@5V{Mkj0~R3uu{mZ>c|)SKcgRXyA?F%TNjd-"
    b">usAK7H#!RewZ_@BH%ApYJ}Fr99O>jKja&WZ;=RC_%2Pvi<rpI<s4kiepeU7wKi}9+<IrO1sLfirb%hTXvOsEevglqP1=!n1g7<tJQ1w+O`1Ym5)"
    b"A*w#C?JjVcu)qh9w!n<NEzMr(Tk*5D&GFTG>91Z~q+@9k4BK^JAwda;P%)|^K5gCp@hQ7tdr#gK3O`%bG~i7)-WKK)7IQDnla7m-M`ZBMob&8@l-"
    b"LaMropgihU*|QYA^+h<}QgIXHm&V;HbEI_n&Zi2i0DXB&b<j{K&yC{80r(dth8qiN5zcqSJodD}5e%6cgCwjt#WIRL9&w7>dq{bO)KDc?uF?b)vV"
    b"gdRRdZ6d+@^pc3Lf{u!t{6Qb})}qdphAjsHxXzRj>A7M%7wPn_=!vjDJY1-"
    b"kk7~7X&9!*ExLaPZ(bXdK<cer!5em+(Y}y`ZFEJGs*@jHCnD)6gZL^@XB@y4NfHNp`d^o7kurcLNJ^Zz4g<L6WPO9oeUHojx*GrsC2Jj&-"
    b"SeI0K^(+Zrb|kygweAu59d6_bpauk#zm|q=q)wfp_K>s|~a}|C=z)iD(6v+L?Sv-Nw=G?Qb0yH$8ss`Quk22@(74HzWUs2O|;j^O6@4nQyTXH3zJ"
    b"TXg~|?p*hTMh`-"
    b"J1Jb#<N0vTl&d^$o3q~wOrMvAa&qteHTBo4qE<2)<1kgwXE0ePZ~{B~aPgcmRJD?3{Z<=4QwOy{t5f(9PLJ*I@w4i4`~$_gTY>=`4dsi-Ex+zeZm"
    b"{G1A!NY5Oc#)KhMV)#>$3UeUNqE)<BQ?3{ueT5~V@ehvRKD)}0d1TjP+XBhzZBs!CymMedxD%N)^rp4dVkYtK9<U8W;1Kf}T*VzeVV1^>P?4I<?;"
    b"`6Y_UtXZ!@C=wHcnT&S<vtFi5WE~)XV)POftm?k+fSVvyco%-Tg!L3)tDZid(k1Cotq_jK8;1jD}htI|fH2`YST)FP(Iq1pfoYK<We"
)


@functools.cache
def books() -> dict[str, Tensor]:
    """Each codebook: [words, weights of a word] int8."""
    kept, made, start = zlib.decompress(base64.b85decode(WORDS)), {}, 0
    for name, (levels, length, count) in BOOKS.items():
        nbytes = -(-(len(levels) ** length) // 8)
        there = one_by_one(torch.frombuffer(bytearray(kept[start : start + nbytes]), dtype=torch.uint8).view(1, -1))
        chosen = there.flatten().nonzero().flatten()
        digits = [chosen // len(levels) ** place % len(levels) for place in range(length)]
        made[name] = torch.tensor(levels, dtype=torch.int8)[torch.stack(digits, dim=1)]
        assert len(chosen) == count
        start += nbytes
    return made


@functools.cache
def table(name: str) -> Tensor:
    """The table of the type `name`, on the CPU."""
    if name.startswith("IQ1"):
        return books()["IQ1"]
    if name in BOOKS:
        return books()[name]
    return torch.tensor(IQ4_VALUES if name.startswith("IQ4") else FP4_VALUES, dtype=torch.int8)


def _found(book: Tensor, codes: Tensor) -> Tensor:
    """The words of `codes`, [n, codes, weights of a word]. Faster than an index between brackets."""
    return book.index_select(0, codes.flatten().int()).view(*codes.shape, *book.shape[1:])


def _eighth_sign(seven: Tensor) -> Tensor:
    """Signs of eight weights of which seven bits are stored: there is always an even number of negative ones."""
    odd = seven ^ (seven >> 4)
    odd = odd ^ (odd >> 2)
    odd = (odd ^ (odd >> 1)) & 1
    return seven | (odd << 7)


def _four_signs(word: Tensor) -> tuple[Tensor, Tensor]:
    """(signs of 4 x 8 weights [n, 4 x words], scales [n, words]) from words of 32 bits, [n, words, 4] uint8."""
    a, b, c, d = word.unbind(2)
    sevens = (a & 127, (a >> 7) | ((b & 63) << 1), (b >> 6) | ((c & 31) << 2), (c >> 5) | ((d & 15) << 3))
    return _eighth_sign(torch.stack(sevens, dim=2).flatten(1)), d >> 4


def _threes(low: Tensor, high: Tensor) -> Tensor:
    """Four numbers of 3 bits out of each 16, of which [n, any] uint8 are the lower and the upper half: [n, 4 x any]."""
    four = (low & 7, (low >> 3) & 7, (low >> 6) | ((high & 1) << 2), (high >> 1) & 7)
    return torch.stack(four, dim=2).flatten(1)


def _in_turn(part: Tensor) -> Tensor:
    """The lower half of each byte, then its upper one: [n, 2 x bytes] uint8."""
    return torch.stack((part & 15, part >> 4), dim=2).flatten(1)


def _iq2_xxs(b: Tensor) -> Words:
    each = b[:, 2:].reshape(len(b), 8, 8)
    signs, steps = _four_signs(each[:, :, 4:])
    return Words(each[:, :, :4].flatten(1).int(), steps, half(b[:, :2]) * 0.125, signs)


def _iq2_xs(b: Tensor) -> Words:
    low, high = b[:, 2:66].reshape(len(b), 32, 2).unbind(2)
    steps = _in_turn(b[:, 66:74])
    places = low.int() | ((high & 1).int() << 8)
    return Words(places, steps, half(b[:, :2]) * 0.125, _eighth_sign(high >> 1))


def _iq2_s(b: Tensor) -> Words:
    places = b[:, 2:34].int() | (pairs(b[:, 66:74], 1).int() << 8)
    steps = _in_turn(b[:, 74:82])
    return Words(places, steps, half(b[:, :2]) * 0.125, b[:, 34:66])


def _iq3_xxs(b: Tensor) -> Words:
    signs, steps = _four_signs(b[:, 66:98].reshape(len(b), 8, 4))
    return Words(b[:, 2:66].int(), steps, half(b[:, :2]) * 0.25, signs)


def _iq3_s(b: Tensor) -> Words:
    places = b[:, 2:66].int() | (bits(b[:, 66:74], 1).int() << 8)
    return Words(places, _in_turn(b[:, 106:110]), half(b[:, :2]), b[:, 74:106])


def _iq1_s(b: Tensor) -> Words:
    low, high = b[:, 34:50].reshape(len(b), 8, 2).unbind(2)
    down = (high >> 7).unsqueeze(2).expand(-1, -1, 4).flatten(1)
    places = b[:, 2:34].int() | (_threes(low, high).int() << 8)
    return Words(places, (high >> 4) & 7, half(b[:, :2]) * 0.125, down=down)


def _iq1_m(b: Tensor) -> Words:
    more = _in_turn(b[:, 32:48])
    low, high = b[:, 48:56].reshape(len(b), 4, 2).unbind(2)
    # The scale of all is in four parts.
    top = high >> 4
    whole = half(torch.stack((top[:, 0] | (top[:, 1] << 4), top[:, 2] | (top[:, 3] << 4)), dim=1))
    places = b[:, :32].int() | ((more & 7).int() << 8)
    return Words(places, _threes(low, high), whole * 0.125, down=more >> 3)


def _iq4_nl(b: Tensor, values: Tensor) -> Codes:
    return Codes(groups(_found(values, nibbles(b[:, 2:], 16)), 32), half(b[:, :2]))


def _iq4_xs(b: Tensor, values: Tensor) -> Codes:
    scales = signed(_in_turn(b[:, 4:8]) | (pairs(b[:, 2:4], 1) << 4), 32).float()
    return Codes(groups(_found(values, nibbles(b[:, 8:], 16)), 32), scales, unit=half(b[:, :2]))


def _mxfp4(b: Tensor, values: Tensor) -> Codes:
    exponent = b[:, :1].int()
    # Half of a power of two, whose two smallest ones have no exponent of their own.
    made = torch.where(exponent < 2, (exponent + 1) << 21, (exponent - 1) << 23)
    return Codes(groups(_found(values, nibbles(b[:, 1:], 16)), 32), made.view(torch.float32))


def _nvfp4(b: Tensor, values: Tensor) -> Codes:
    exponent, digits = ((b[:, :4] >> 3) & 15).int(), (b[:, :4] & 7).int()
    whole = (((exponent + 120) << 23) | (digits << 20)).view(torch.float32)
    scales = torch.where(exponent == 0, digits.float() * 2.0**-9, whole) * 0.5
    # The largest one without a sign is no number, and counts for nothing.
    return Codes(groups(_found(values, nibbles(b[:, 4:], 8)), 16), scales * (b[:, :4] != 127))


READERS = {"IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4, "NVFP4": _nvfp4}
WORD_READERS = {
    "IQ1_S": _iq1_s, "IQ1_M": _iq1_m, "IQ2_XXS": _iq2_xxs, "IQ2_XS": _iq2_xs, "IQ2_S": _iq2_s, "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}  # fmt: skip
