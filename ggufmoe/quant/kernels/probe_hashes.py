"""Fingerprints of what the pinned ggml makes of the probe on x86-64; written by ``scripts/probe_hashes.py``.

``ggml`` is that of all bytes, ``kernel`` that of which blocks a kernel leaves to ggml and the bytes of all the others.
"""

from __future__ import annotations

from typing import NamedTuple


class ProbeHashes(NamedTuple):
    """Of one format made of one kind of source, with or without importances."""

    ggml: str
    kernel: str


HASHES = {
    "Q4_0 from F32": ProbeHashes("1439d86fcf66397217ce364612ef5048", "11b6e9b72dad8e9d7e78b6d082453cc2"),
    "Q4_0 from F32 with importances": ProbeHashes(
        "f1b32e0574cf61f362d94f5d1441e473", "f1b32e0574cf61f362d94f5d1441e473"
    ),
    "Q4_0 from F16": ProbeHashes("8761acb091d67ee6c15e9c49475917f6", "8761acb091d67ee6c15e9c49475917f6"),
    "Q4_0 from F16 with importances": ProbeHashes(
        "c79f08bd15562d230e5781ff9edffc82", "c79f08bd15562d230e5781ff9edffc82"
    ),
    "Q4_0 from BF16": ProbeHashes("37cd2c89ca7ca89efc3c1d7b34112570", "37cd2c89ca7ca89efc3c1d7b34112570"),
    "Q4_0 from BF16 with importances": ProbeHashes(
        "937fe1bc5a87048cf2810e43018e2f96", "937fe1bc5a87048cf2810e43018e2f96"
    ),
    "Q4_1 from F32": ProbeHashes("a2daaf38d5564ead16c8f9aac6d3e293", "d95a080fc42017a9698b32c13d195de1"),
    "Q4_1 from F32 with importances": ProbeHashes(
        "1bfc909518be8d3eb1fc52bde7cf2e07", "7859cb3c349afadb129848cc754fc81f"
    ),
    "Q4_1 from F16": ProbeHashes("cef1f3cf14538534dbfbced95c84b192", "cef1f3cf14538534dbfbced95c84b192"),
    "Q4_1 from F16 with importances": ProbeHashes(
        "22a84af3eb2bf567e295a7560220514d", "22a84af3eb2bf567e295a7560220514d"
    ),
    "Q4_1 from BF16": ProbeHashes("e908bdb97e8fd1d18c3ac0a05e25ecd2", "e908bdb97e8fd1d18c3ac0a05e25ecd2"),
    "Q4_1 from BF16 with importances": ProbeHashes(
        "47ace50d0c82ad8aafddcc9f9efdc95c", "47ace50d0c82ad8aafddcc9f9efdc95c"
    ),
    "Q5_0 from F32": ProbeHashes("a91b976204522335824b7fc2732e7d49", "1681f6b89ee9032f8142131cb205ced2"),
    "Q5_0 from F32 with importances": ProbeHashes(
        "ee0019c62b1cd313294a33714bf72057", "ee0019c62b1cd313294a33714bf72057"
    ),
    "Q5_0 from F16": ProbeHashes("3c4a083b04c5d9a6c9c9185076f8e227", "3c4a083b04c5d9a6c9c9185076f8e227"),
    "Q5_0 from F16 with importances": ProbeHashes(
        "bc7106ea2403fb335dfa73d6eeed8271", "bc7106ea2403fb335dfa73d6eeed8271"
    ),
    "Q5_0 from BF16": ProbeHashes("9d37c01c4d46021a902208f6cc51ce1a", "9d37c01c4d46021a902208f6cc51ce1a"),
    "Q5_0 from BF16 with importances": ProbeHashes(
        "89f627cb2a98a5ba3d1680f1551ec169", "89f627cb2a98a5ba3d1680f1551ec169"
    ),
    "Q5_1 from F32": ProbeHashes("77061a20f4eb5abf1eb8d1454014eeed", "2c425e0969ffc61862c14859be8c8aa3"),
    "Q5_1 from F32 with importances": ProbeHashes(
        "8010c391dd52fce647fd44506510e47a", "c14e894f3daa34f449e03f5de4701986"
    ),
    "Q5_1 from F16": ProbeHashes("3957657f2a06e4db8aa13d023f2199f8", "3957657f2a06e4db8aa13d023f2199f8"),
    "Q5_1 from F16 with importances": ProbeHashes(
        "c375b4fe87d49d617763230d3d873ff9", "c375b4fe87d49d617763230d3d873ff9"
    ),
    "Q5_1 from BF16": ProbeHashes("334b5451f3326b8fe03c6ce4dabfdbc5", "334b5451f3326b8fe03c6ce4dabfdbc5"),
    "Q5_1 from BF16 with importances": ProbeHashes(
        "8db92a37ff4d910b569b11bdd7e3ba93", "8db92a37ff4d910b569b11bdd7e3ba93"
    ),
    "Q8_0 from F32": ProbeHashes("d3c958c54f74368b4463331da6db64fb", "dfc1d6f44e004e3e4f4bb42619827f6f"),
    "Q8_0 from F16": ProbeHashes("c6f6685de9045bba78f6d27e7a63172c", "c6f6685de9045bba78f6d27e7a63172c"),
    "Q8_0 from BF16": ProbeHashes("366f1c8594ef45563554773a0576fe8d", "366f1c8594ef45563554773a0576fe8d"),
    "Q2_K from F32": ProbeHashes("30940194af2aec5507a7c9dbb6143b0f", "b018e5b6c0cd4f370c7b17b80fe13f0f"),
    "Q2_K from F32 with importances": ProbeHashes(
        "2ada3b90d21fe560be23cceea51a6a45", "f062252a34a0e284137764bfde5e41e4"
    ),
    "Q2_K from F16": ProbeHashes("ae456cba6f0b27da91a09a83fa0def28", "ae456cba6f0b27da91a09a83fa0def28"),
    "Q2_K from F16 with importances": ProbeHashes(
        "7bdabb49f43fc3043ff424bab7d60c2b", "7bdabb49f43fc3043ff424bab7d60c2b"
    ),
    "Q2_K from BF16": ProbeHashes("2ddb568c26f336a498d29490a31374a6", "2ddb568c26f336a498d29490a31374a6"),
    "Q2_K from BF16 with importances": ProbeHashes(
        "77ac7703357b289a5c13789a9c3d8092", "77ac7703357b289a5c13789a9c3d8092"
    ),
    "Q3_K from F32": ProbeHashes("aef929b9b14aab8ece5abf1644a38c9e", "aef929b9b14aab8ece5abf1644a38c9e"),
    "Q3_K from F32 with importances": ProbeHashes(
        "a2a21f33f5339d8ef7495512d105459c", "a2a21f33f5339d8ef7495512d105459c"
    ),
    "Q3_K from F16": ProbeHashes("a71100a76ed7c203fb2a177cc0aafaaa", "a71100a76ed7c203fb2a177cc0aafaaa"),
    "Q3_K from F16 with importances": ProbeHashes(
        "70201df1d234743aa4c1145afd6ee72d", "70201df1d234743aa4c1145afd6ee72d"
    ),
    "Q3_K from BF16": ProbeHashes("205fa8d971d161ec557907d0476909cf", "205fa8d971d161ec557907d0476909cf"),
    "Q3_K from BF16 with importances": ProbeHashes(
        "a222146e9feadeb63dd31fe2236ff728", "a222146e9feadeb63dd31fe2236ff728"
    ),
    "Q4_K from F32": ProbeHashes("460956062ea1977a8c8bf7e04336e881", "249ce72757cb11822cd38b914d80c89b"),
    "Q4_K from F32 with importances": ProbeHashes(
        "4fee533c191cbf030d05bdd3c97cce2a", "d87afe08928ef518ced376d3bd95fd2d"
    ),
    "Q4_K from F16": ProbeHashes("ecd3356b19853499b3f6b01d1dd9e401", "ecd3356b19853499b3f6b01d1dd9e401"),
    "Q4_K from F16 with importances": ProbeHashes(
        "91ff23d075c6f36cdd82935b1ce3ff1b", "91ff23d075c6f36cdd82935b1ce3ff1b"
    ),
    "Q4_K from BF16": ProbeHashes("b7de0ecddb58ea879fbbaa33629535f4", "b7de0ecddb58ea879fbbaa33629535f4"),
    "Q4_K from BF16 with importances": ProbeHashes(
        "35bcf25f58534a2dc9caa771ee991db8", "35bcf25f58534a2dc9caa771ee991db8"
    ),
    "Q5_K from F32": ProbeHashes("404ad7e1626df79bad861fbc0863f6e8", "90c5cf67aeb1a675318ba408f76ea84c"),
    "Q5_K from F32 with importances": ProbeHashes(
        "b97b20ab2dbba05417cfc9fbfa8c8776", "6cc36f1ec8f7065ede29d5ebbeb80657"
    ),
    "Q5_K from F16": ProbeHashes("e51dcd3e47b9f0bf83dc0aae359fbdbb", "e51dcd3e47b9f0bf83dc0aae359fbdbb"),
    "Q5_K from F16 with importances": ProbeHashes(
        "31f1f646428ce02773be83cb765e3852", "31f1f646428ce02773be83cb765e3852"
    ),
    "Q5_K from BF16": ProbeHashes("265ddef67638454fecdd236231a2baef", "265ddef67638454fecdd236231a2baef"),
    "Q5_K from BF16 with importances": ProbeHashes(
        "15dd2493a954f1f11e40c6e214f26994", "15dd2493a954f1f11e40c6e214f26994"
    ),
    "Q6_K from F32": ProbeHashes("7ad631a7c74a3fa47feb410b9525d34b", "7ad631a7c74a3fa47feb410b9525d34b"),
    "Q6_K from F32 with importances": ProbeHashes(
        "ba30a2e3feeaeb1a346289d5a1bf1ae7", "ba30a2e3feeaeb1a346289d5a1bf1ae7"
    ),
    "Q6_K from F16": ProbeHashes("bc63a5dc8578bbb9950093cf99961e40", "bc63a5dc8578bbb9950093cf99961e40"),
    "Q6_K from F16 with importances": ProbeHashes(
        "b67382d8a0cc82287a9bf1cfccfd5ddc", "b67382d8a0cc82287a9bf1cfccfd5ddc"
    ),
    "Q6_K from BF16": ProbeHashes("b0842643aa6b935f6b1e655acd1b5347", "b0842643aa6b935f6b1e655acd1b5347"),
    "Q6_K from BF16 with importances": ProbeHashes(
        "533d059cd5bc216cd2e586d00344c4ee", "533d059cd5bc216cd2e586d00344c4ee"
    ),
    "IQ2_XXS from F32 with importances": ProbeHashes(
        "d864022c048da280d64c7615c32644b4", "d864022c048da280d64c7615c32644b4"
    ),
    "IQ2_XXS from F16 with importances": ProbeHashes(
        "c5072c93962319b6fa7c965bbdc28698", "c5072c93962319b6fa7c965bbdc28698"
    ),
    "IQ2_XXS from BF16 with importances": ProbeHashes(
        "569acc6a0d66cb5a1bbdee985f5de3db", "569acc6a0d66cb5a1bbdee985f5de3db"
    ),
    "IQ2_XS from F32 with importances": ProbeHashes(
        "1d3805c382218ec4fdac6935e9879254", "1d3805c382218ec4fdac6935e9879254"
    ),
    "IQ2_XS from F16 with importances": ProbeHashes(
        "e23d16960605305e7feca8a2665ab2a3", "e23d16960605305e7feca8a2665ab2a3"
    ),
    "IQ2_XS from BF16 with importances": ProbeHashes(
        "6052190c139f1e58dd129ce1f30aeb08", "6052190c139f1e58dd129ce1f30aeb08"
    ),
    "IQ3_XXS from F32": ProbeHashes("e6fa2bb66469f2d98f077c2204154d32", "e6fa2bb66469f2d98f077c2204154d32"),
    "IQ3_XXS from F32 with importances": ProbeHashes(
        "f32a260aa7866ce5c4619b94bb3c37fa", "f32a260aa7866ce5c4619b94bb3c37fa"
    ),
    "IQ3_XXS from F16": ProbeHashes("4b226e967d9d3e898ab475b4b1585517", "4b226e967d9d3e898ab475b4b1585517"),
    "IQ3_XXS from F16 with importances": ProbeHashes(
        "c21ffe657fc34c4c932c7da57f98e8e3", "c21ffe657fc34c4c932c7da57f98e8e3"
    ),
    "IQ3_XXS from BF16": ProbeHashes("502e4f7baee01a0f0e3f08f6af745b61", "502e4f7baee01a0f0e3f08f6af745b61"),
    "IQ3_XXS from BF16 with importances": ProbeHashes(
        "06612c52e8e8fe32cf86919e6f7b9e3e", "06612c52e8e8fe32cf86919e6f7b9e3e"
    ),
    "IQ1_S from F32 with importances": ProbeHashes(
        "fc00504f372ba42c1cec5d6e5e838886", "fc00504f372ba42c1cec5d6e5e838886"
    ),
    "IQ1_S from F16 with importances": ProbeHashes(
        "ce4dd7cb92029ebd76202b2e829b2ea1", "ce4dd7cb92029ebd76202b2e829b2ea1"
    ),
    "IQ1_S from BF16 with importances": ProbeHashes(
        "26cade976f370378e4de9def086fb32d", "26cade976f370378e4de9def086fb32d"
    ),
    "IQ4_NL from F32": ProbeHashes("566a902f9db9b65c0c5e9108306a8c69", "566a902f9db9b65c0c5e9108306a8c69"),
    "IQ4_NL from F32 with importances": ProbeHashes(
        "32e3a24463960616d57c1205a12b999d", "32e3a24463960616d57c1205a12b999d"
    ),
    "IQ4_NL from F16": ProbeHashes("9421ddf0ca4afd8be92a20e60b428e8c", "9421ddf0ca4afd8be92a20e60b428e8c"),
    "IQ4_NL from F16 with importances": ProbeHashes(
        "4c3ec828b90b6c138e9c9586a182aaea", "4c3ec828b90b6c138e9c9586a182aaea"
    ),
    "IQ4_NL from BF16": ProbeHashes("ebb98805100be603b1cff52c533bc810", "ebb98805100be603b1cff52c533bc810"),
    "IQ4_NL from BF16 with importances": ProbeHashes(
        "a3821ae91400140f4a661905c829195c", "a3821ae91400140f4a661905c829195c"
    ),
    "IQ3_S from F32": ProbeHashes("9f18d3a3a048af5e1abcaf7703500ad7", "e784757ba2b8f899b0c24300e5175b51"),
    "IQ3_S from F32 with importances": ProbeHashes(
        "44fe6296807bf87fb6e3c7d0eaa5fe98", "f3b43b2506972b8d666fbb520b45fcce"
    ),
    "IQ3_S from F16": ProbeHashes("7d64b004ffb69ac9ab717e44a7e05fa5", "7d64b004ffb69ac9ab717e44a7e05fa5"),
    "IQ3_S from F16 with importances": ProbeHashes(
        "4601111dd886e0f6fb7c4d82091a9867", "4601111dd886e0f6fb7c4d82091a9867"
    ),
    "IQ3_S from BF16": ProbeHashes("5a7ef164ac22d96f0e1779059f121ff7", "5a7ef164ac22d96f0e1779059f121ff7"),
    "IQ3_S from BF16 with importances": ProbeHashes(
        "b20e439b3779c0df4313778a8dc6da1d", "b20e439b3779c0df4313778a8dc6da1d"
    ),
    "IQ2_S from F32": ProbeHashes("c15841c064d53cc20d6001959aa5399e", "c15841c064d53cc20d6001959aa5399e"),
    "IQ2_S from F32 with importances": ProbeHashes(
        "0895e5b41465c71d4683857ac3aa2a0a", "0895e5b41465c71d4683857ac3aa2a0a"
    ),
    "IQ2_S from F16": ProbeHashes("8b29d101de2a57fee9136f45dbf0b46c", "8b29d101de2a57fee9136f45dbf0b46c"),
    "IQ2_S from F16 with importances": ProbeHashes(
        "116402444cbbe102b643d0be9ed9bf7f", "116402444cbbe102b643d0be9ed9bf7f"
    ),
    "IQ2_S from BF16": ProbeHashes("17b86d3b0bfb9387f05e53120eb375ef", "17b86d3b0bfb9387f05e53120eb375ef"),
    "IQ2_S from BF16 with importances": ProbeHashes(
        "6f4529cf9d5bf1362f0e9f48457507a6", "6f4529cf9d5bf1362f0e9f48457507a6"
    ),
    "IQ4_XS from F32": ProbeHashes("4e09dd98698df68fd294261c7d263b2a", "4e09dd98698df68fd294261c7d263b2a"),
    "IQ4_XS from F32 with importances": ProbeHashes(
        "f5783cce097401b61bdb1fd920fa5466", "f5783cce097401b61bdb1fd920fa5466"
    ),
    "IQ4_XS from F16": ProbeHashes("e8d6d00c9769464f0b38602e44127a54", "e8d6d00c9769464f0b38602e44127a54"),
    "IQ4_XS from F16 with importances": ProbeHashes(
        "084d7f74ec7f75ce51bec8851bc63e5e", "084d7f74ec7f75ce51bec8851bc63e5e"
    ),
    "IQ4_XS from BF16": ProbeHashes("8dc34baec87f895e7ccf03f17f0640ac", "8dc34baec87f895e7ccf03f17f0640ac"),
    "IQ4_XS from BF16 with importances": ProbeHashes(
        "337413afa9bec402981d58341c40374f", "337413afa9bec402981d58341c40374f"
    ),
    "IQ1_M from F32": ProbeHashes("774dd8274d80cfe1ea84a075eeb4b29d", "9bd553045812240b16707a10c0b5fc80"),
    "IQ1_M from F32 with importances": ProbeHashes(
        "da308e530fc9ff7771fe66bf1b73fdca", "da308e530fc9ff7771fe66bf1b73fdca"
    ),
    "IQ1_M from F16": ProbeHashes("4dfa31d32dcd283f1a06f142f1aba582", "4dfa31d32dcd283f1a06f142f1aba582"),
    "IQ1_M from F16 with importances": ProbeHashes(
        "30afb6dcc681527c5aa96765048da3bb", "30afb6dcc681527c5aa96765048da3bb"
    ),
    "IQ1_M from BF16": ProbeHashes("a0e71d6bfe02d2e9aa1d2af23291ef44", "ba394e2f4e7c7c109b5f316b06a9703c"),
    "IQ1_M from BF16 with importances": ProbeHashes(
        "4df384065b835bf5c687ce8ceb9ab6a7", "4df384065b835bf5c687ce8ceb9ab6a7"
    ),
    "NVFP4 from F32": ProbeHashes("931a3db683a8b1251a97f0a2679ea0a7", "931a3db683a8b1251a97f0a2679ea0a7"),
    "NVFP4 from F16": ProbeHashes("75ff431d3bb7b82084dfa39934378c7c", "75ff431d3bb7b82084dfa39934378c7c"),
    "NVFP4 from BF16": ProbeHashes("12a4fa4e54868102eed0b97fcdf8deda", "12a4fa4e54868102eed0b97fcdf8deda"),
}

GGML_ALONE = {
    "TQ1_0": "b1373c6852236dbf5c8f60fbdbf6c69b",
    "TQ2_0": "4b23b245f87947af3c499c9b3e7994f1",
    "MXFP4": "a9c3f9614777acce6280f7fae3b69d08",
    "Q1_0": "7cc0e2ec5ab09f9b80d03da6cc7bdcfd",
    "Q2_0": "bd45a539e36854fdfa693829e3d459db",
}
"""The hash of all bytes for formats without a kernel, made of float32."""
