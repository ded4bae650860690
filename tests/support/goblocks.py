"""Small blocks that were compressed by libraries of another language.

Each contains ``text(3000)`` of :mod:`tests.support.squashfs`. They were made with Go 1.19 and the libraries
of Debian 12 that go-diskfs and other Go programs use to write squashfs, with their usual functions:
compress/zlib (level 9), klauspost/compress 1.15.12 (zstd, fastest), pierrec/lz4 2.5.2 (CompressBlock) and
ulikunitz/xz 0.5.6 (once with its defaults, whose checksum and dictionary size the kernel does not support,
and once with CRC32 and a dictionary of 8 KiB).
"""

from __future__ import annotations

import base64

_BLOCKS = {
    "zlib": (
        1,
        "c-manJ4!`C5C-AgRh%Wv-"
        "}7FOf*`v8Ofa$PW}S5@_k7b|pWp9KdwxEi_Vzaib7Ah72j+=+VcwVz=F44L%+2BIaCf*o+#aqE_lE&tL9w9px3i#FP%J1G6b"
        "p(4#e!l%XF+E{*T0_yodul*odul*odul*g9U>Hg9Sss02T}u3>FL)3>FL)OcqQQOcqQQO#KL1Fj+8JFj+8JuvoBIuvoBIuvo"
        "D49k5`rV6kAaV6$MeV6$MeV6$MeVCz$4!Dhi`!C}E+!C}E+!C}E+!C}FX1}r!%xGcCVxGcCVxGcCVxGcCVxB|%{iKHfznow#"
        "|sfnc~mzrQ|lBtQNrj{2T)nXtmq=~eVM$$@}NjVuonX=Vtk(Cjak(Lpck(Uvek(d#gk(ud!IMgCGBR3;BBRL~FBReBJBRwNN"
        "GyICFMS@0zMutX+Mv6v^Mvg|1Mv`XwNmYw5jWmrojXaG&jYN$|jZBSD&GP%M7P%V18p#^b8rd4*8tEGG8u^;-"
        "V?!+>HZnFsHc~cXHgYzCHj*}?HpiEbTBL2nZRBkPZX|9*Ze(tRZlrFm&oJL%I>h8|$=#B>C3j2imfS75TXMJLZpBBTTI6oY-"
        "IBW{cT4V;+%36VzE6Fi{=54d00960qP`zC",
    ),
    "zstd-once": (
        6,
        "D77#BWVi~A2LKWfA`-w6;d^<+sl!PrrA#RSlQ7}|ElH9jxvuNFuIsw4RaI40RYXKYL_{+)Gcz+HA|fIp5fKp)5&!@Hzir#L-"
        "L`Gpk|arz<2a7vIF933RaI40MMOkIL^LxqGczM1A|fIZ5fKp)@&Et-"
        "+qP}nZQHgjNs=UsM&d39L191$Yyb!tHV6s>LV(?<0p!<z0MLtK5EcYPd|Q<#%A0rIyid>4>he-"
        "Evo*Q6+SpWGPEPhdk~-2FIT?A2oQk|ePDI`zr{Vhl{(pb}zrX+A-~aEmAPLey3S>Y6<lp!Gy!Z1W000CX{DXhMIrx6PE;xz",
    ),
    "lz4": (
        5,
        "!E9-"
        "6WgsvhZ)PAc3Jd@jF$@3~G7JD0GYkM1Gz<V2H4Fe3HVgn4Hw*w5I1B(6ISc?9F?j$8dH@(PdjJ?Qd;l0ReE=9SegGITe*hRU"
        "fB+aVfdCjWf&dsYf&dsYf&dsYf&dsYf&dsYf&dsYf&dsYf&dsYf&dsYf&dsYf&dsZf&dsZf&dsZf&dsZf&dsZf&dsZf&dsZf"
        "&dsZf&dsZf&dsZf&dsaf&dsaf&dsaf&dsaf&dsaf&dsaf&dsaf&dsaf&dsaf&dsaf&dsbf&dsbf&dsbf&dsbf&dsbf&dsbf&"
        "dsbf&dsbf&dsbf&dsbf&dscf&dscf&dscf&dscf&dscf&dscf&dscf&dscf&dscf&dscf&dsdf&dsdf&dsdf&dsdf&dsdf&d"
        "sdf&dsdf&dsdf&dsdf&dsdf&dsef&dsef&dsef&dsef&dsef&dsef&dsef&dsef&dsef&dsef&dsff&dsff&dsff&dsff&ds"
        "ff&dsff&dsff&dsff&dsff&dsff&eHnFoOUnF))MxC^0aF04Omqh5#rrFoysrF))Y#C^0aJ04OmqiU24vFpB^wF))k(3m*ju"
        "i~tHD1qvbs3L^yyBn1j31qvnw3MT~#C<PfYDFqoZDg_xaD+L)bECm@cEd?1dE(IAeF9jJfFa;SgF$EbhG6fkiGX)tjGzA$kH"
        "3b<lHU$|mHw76nI0YFoIRzOpIt3XqI|UgrJOvpsJp~ytJ_Q*uKLr^vKm{2wK?NBxLIoKyLj@TzL<Jc!MFkl#Mg<u$M+F%%NC"
        "g=&Nd*}(N(C7)O9dG*Oa&P+O$8Y-"
        "P6Zh;PX!q<Pz4z=Q3V+>QUw_?Qw13@R0SC^RRtL_Rs|U`R|Od{SOpm|Sp^v}S_K&~TLl?0Tm>01T?HvIH%J2sUj-"
        "R4U<Da5VFej6Vg(s7V+9#8WCa;9Wd#{AW(65BX9XECXayNDX$2WEY6TfFYXuoGYy}xHZ3P)IZUq@JZv`1Ka0MALaRnJMas?S"
        "Na|IbObOjkPbp;tQb_E$RcLf<Scm)|Ucm)|Ucm)|Ucm)|Ucm)|Ucm)|Ucm)|Ucm)|Ucm)|Ucm)|Ucm)|Ucm)|Ucm)|Ucm)|U"
        "cm)|Ucm)|Ucm)|Ucm)|Ucm)|Ucm)|Ucm)tLcm)8Q3jnAKz#uX*F(7YdATSDSX#",
    ),
    "xz": (
        4,
        "{Wp48S^xk9=GL@E0stWa761SMbT8$j;0w0_g<SwP8cH7spe6%N2Pc6>;wVDNR3Mn9e+Ua*h#G2{DdS@7WxZkg8kbmNnzU!gh"
        "r~&AFBB?x$7R#!jfq0;FNY^SV=X8N7L#w(-s&ZFP$#$O)?aMmJ|=7g-OQVmVAq`hgqn9xgFt@p-JR0aNquJpZo7e$jzKNS-"
        "(Tk~0$a)9l$|=R>Y9U^CX>oS3VC~S>K@4$(HXHJi+6g;INnlhKSx&u#`>87Hkv)OarQ%}6BO$L$76!fILt1JCs#H?{V%^aqF"
        "r4nQXYW|4u0m%!5X@dJWJL+>KCK5fy`)1v*1E+b7Pbr_!DLISJzxn27;sv(^N3bzU&y(JPD*V@(FB@1c7I6P(v~am;<r=U57"
        "O<em6lCNuH`OzdQa>(TReb6CV(<thJgrX(H~}b*6X$6^Ej}!dvkR|EzPef-$sXs`73BnkR0P&R`-"
        "l&|%^SPC+)Db0O$VT1IMR<6>@M6wM<mK8)2~CMgc*U;(oob;a@dp&?Nd4(|)r<vv*e00000T7S*L5jn^L00E%`xEBBb#=jbu"
        "vBYQl0ssI200dcD",
    ),
    "xz-crc32": (
        4,
        "{Wp48S^xk6X(HY>0stWa0ssI2yzicT;0w0_g<SwP8cH7spe6%N2Pc6>;wVDNR3Mn9e+Ua*h#G2{DdS@7WxZkg8kbmNnzU!gh"
        "r~&AFBB?x$7R#!jfq0;FNY^SV=X8N7L#w(-s&ZFP$#$O)?aMmJ|=7g-OQVmVAq`hgqn9xgFt@p-JR0aNquJpZo7e$jzKNS-"
        "(Tk~0$a)9l$|=R>Y9U^CX>oS3VC~S>K@4$(HXHJi+6g;INnlhKSx&u#`>87Hkv)OarQ%}6BO$L$76!fILt1JCs#H?{V%^aqF"
        "r4nQXYW|4u0m%!5X@dJWJL+>KCK5fy`)1v*1E+b7Pbr_!DLISJzxn27;sv(^N3bzU&y(JPD*V@(FB@1c7I6P(v~am;<r=U57"
        "O<em6lCNuH`OzdQa>(TReb6CV(<thJgrX(H~}b*6X$6^Ej}!dvkR|EzPef-$sXs`73BnkR0P&R`-"
        "l&|%^SPC+)Db0O$VT1IMR<6>@M6wM<mK8)2~CMgc*U;(oob;a@dp&?Nd4(|)r<vv*e000000CA$X00Er?xEBBb5O|{GJ}?c7"
        "0ssI200CKA",
    ),
}

BLOCKS = {name: (compressor, base64.b85decode(text)) for name, (compressor, text) in _BLOCKS.items()}
"""The number of the compressor in squashfs, and the block, by name."""
