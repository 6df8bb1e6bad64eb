"""Encodings that the assembler chooses: NASM 2.16's bytes, line by line, in all modes.

Where the assembler's choice is its own, it stands in a second table with the reason.
"""

import pytest
from iced_x86 import Decoder

from trivisor.x86 import instructions
from trivisor.x86.assembler import AssemblyError, assemble

NASM_64 = """
4889d8                mov rax, rbx
88e0                  mov al, ah
4488c6                mov sil, r8b
b8ffffffff            mov eax, -1
48c7c0ffffffff        mov rax, -1
48b8f0debc9a78563412  mov rax, 0x123456789abcdef0
48c700fbffffff        mov qword [rax], -5
c6042461              mov byte [rsp], 'a'
6641c704243412        mov word [r12], 0x1234
41c7450001000000      mov dword [r13], 1
894500                mov [rbp], eax
8b442d00              mov eax, [rbp*2]
8b0400                mov eax, [rax*2]
8b444001              mov eax, [rax*3+1]
8b0480                mov eax, [rax*5]
8b44cafc              mov eax, [rdx+8*rcx-4]
8b42f8                mov eax, [-8+rdx]
8b0404                mov eax, [rax+rsp]
8b0404                mov eax, [rsp+rax]
8b842480000000        mov eax, [rsp+0x80]
8b407f                mov eax, [rax+127]
8b8080000000          mov eax, [rax+128]
8b807fffffff          mov eax, [rax-129]
678b4004              mov eax, [eax+4]
67418b0488            mov eax, [r8d+ecx*4]
8b042500100000        mov eax, [0x1000]
658b042510000000      mov eax, [gs:0x10]
64488b042500000000    mov rax, [fs:0]
8b05faffffff          mov eax, [rel $]
a18877665544332211    mov eax, [qword 0x1122334455667788]
a28877665544332211    mov [qword 0x1122334455667788], al
0f20c0                mov rax, cr0
440f22c0              mov cr8, rax
0f23f9                mov dr7, rcx
668cd8                mov ax, ds
8ed8                  mov ds, ax
8e10                  mov ss, [rax]
8c00                  mov [rax], es
8ce0                  mov eax, fs
4883c001              add rax, 1
480580000000          add rax, 128
4881c180000000        add rcx, 128
83c0ff                add eax, 0xffffffff
0405                  add al, 5
80c105                add cl, 5
8000c8                add byte [rax], 200
488100ffffff7f        add qword [rax], 0x7fffffff
833805                cmp dword [rax], 5
83e0f8                and eax, ~7
31c0                  xor eax, eax
a801                  test al, 1
8508                  test ecx, [rax]
93                    xchg ebx, eax
8708                  xchg ecx, [rax]
0fafc3                imul eax, ebx
6bc305                imul eax, ebx, 5
6bc005                imul eax, 5
486901f4010000        imul rax, [rcx], 500
48f7e9                imul rcx
f618                  neg byte [rax]
48ff08                dec qword [rax]
d1e0                  shl eax, 1
d1e0                  sal eax, 1
d228                  shr byte [rax], cl
66d100                rol word [rax], 1
0fa4c805              shld eax, ecx, 5
480fad08              shrd [rax], rcx, cl
0fbae005              bt eax, 5
480fab08              bts [rax], rcx
f3480fbcc3            tzcnt rax, rbx
f3480fb803            popcnt rax, [rbx]
490fc8                bswap r8
0fb6c3                movzx eax, bl
0fb600                movzx eax, byte [rax]
490fb7c0              movzx rax, r8w
4863c1                movsxd rax, ecx
486301                movsxd rax, [rcx]
488d448b05            lea rax, [rbx+rcx*4+5]
488d0500000000        lea rax, [rel $+7]
50                    push rax
6a05                  push 5
687fffffff            push -129
6878563412            push 0x12345678
666a05                push word 5
6a05                  push qword 5
ff30                  push qword [rax]
66ff30                push word [rax]
0fa0                  push fs
8f00                  pop qword [rax]
9c                    pushf
9d                    popf
c3                    ret
c20800                ret 8
cb                    retf
ca0800                retf 8
cf                    iret
48cf                  iretq
ffd0                  call rax
ff10                  call [rax]
ffe0                  jmp rax
ff24c500100000        jmp qword [rax*8+0x1000]
ff28                  jmp far dword [rax]
48ff28                jmp far qword [rax]
66ff18                call far word [rax]
ebfe                  jmp short $
ebfe                  jmp $
e9fbffffff            jmp near $
e8fbffffff            call $
0f84faffffff          jz near $
67e3fd                jecxz $
e3fe                  jrcxz $
e2fe                  loop $
e0fe                  loopnz $
0f9400                setz [rax]
0f9700                setnbe byte [rax]
480f45c3              cmovnz rax, rbx
f00fb108              lock cmpxchg [rax], ecx
f00100                lock add [rax], eax
f0480fc708            lock cmpxchg16b [rax]
480fc108              xadd [rax], rcx
f3a4                  rep movsb
f3ab                  rep stosd
f3a6                  repe cmpsb
f2ae                  repne scasb
67a4                  a32 movsb
65ac                  gs lodsb
d7                    xlatb
e460                  in al, 0x60
ed                    in eax, dx
ee                    out dx, al
e680                  out 0x80, al
cd80                  int 0x80
cd03                  int 3
cc                    int3
90                    nop
0f1f00                nop dword [rax]
660f1f0400            nop word [rax+rax]
f390                  pause
0f32                  rdmsr
0f07                  sysret
480f07                o64 sysret
0f0110                lgdt [rax]
0f00d0                lldt ax
0f00d8                ltr ax
660f00c0              sldt ax
0f01f0                lmsw ax
0f0028                verw [rax]
0f02c1                lar eax, cx
0f0301                lsl eax, [rcx]
0fae38                clflush [rax]
0f0b                  ud2
c8100000              enter 16, 0
c9                    leave
480fae08              fxrstor64 [rax]
480fae28              xrstor64 [rax]
0f01d1                xsetbv
0fae10                ldmxcsr [rax]
9b                    fwait
d900                  fld dword [rax]
db28                  fld tword [rax]
ddd9                  fstp st1
d9c9                  fxch
dcc1                  fadd st1, st0
d8c1                  fadd st1
dec1                  faddp
dec1                  faddp st1
d808                  fmul dword [rax]
df00                  fild word [rax]
df38                  fistp qword [rax]
d928                  fldcw [rax]
dfe0                  fnstsw ax
dbf1                  fcomi st0, st1
dac1                  fcmovb st0, st1
dd30                  fnsave [rax]
660f6ec0              movd xmm0, eax
0f6e00                movd mm0, [rax]
66480f6ec0            movq xmm0, rax
f30f7ec1              movq xmm0, xmm1
f30f7e00              movq xmm0, [rax]
440f1108              movups [rax], xmm9
f30f6f00              movdqu xmm0, oword [rax]
f20f1000              movsd xmm0, [rax]
f20f1100              movsd [rax], xmm0
a5                    movsd
a7                    cmpsd
f20fc2c102            cmpsd xmm0, xmm1, 2
0f59ca                mulps xmm1, xmm2
f2480f2ac0            cvtsi2sd xmm0, rax
f2480f2a00            cvtsi2sd xmm0, qword [rax]
f2480f2cc0            cvttsd2si rax, xmm0
660fefc0              pxor xmm0, xmm0
0fef00                pxor mm0, [rax]
660f73f804            pslldq xmm0, 4
660ff100              psllw xmm0, [rax]
660fc5c001            pextrw eax, xmm0, 1
660f3a150001          pextrw [rax], xmm0, 1
66480f3a220001        pinsrq xmm0, [rax], 1
660fd7c0              pmovmskb eax, xmm0
660f3810c1            pblendvb xmm0, xmm1
660f3a44c111          pclmulqdq xmm0, xmm1, 0x11
f2480f38f103          crc32 rax, qword [rbx]
0f38f003              movbe eax, [rbx]
f3480faec0            rdfsbase rax
f30faed9              wrgsbase ecx
c4c17828c0            vmovaps xmm0, xmm8
c57c1100              vmovups [rax], ymm8
c5f558c2              vaddpd ymm0, ymm1, ymm2
c5f1ef00              vpxor xmm0, xmm1, [rax]
c4e37d39c801          vextracti128 xmm0, ymm1, 1
c4e269900488          vpgatherdd xmm0, [rax+xmm1*4], xmm2
c4e2ed9344c810        vgatherqpd ymm0, [rax+ymm1*8+16], ymm2
c5f877                vzeroupper
62f17548fec2          vpaddd zmm0, zmm1, zmm2
62e1fe486f08          vmovdqu64 zmm17, [rax]
c5f892c8              kmovw k1, eax
c4e260f2c1            andn eax, ebx, ecx
c4e2f1f703            shlx rax, [rbx], rcx
660f388001            invept rax, [rcx]
c7f8faffffff          xbegin $
c6f805                xabort 5
0f01cb                stac
660ff7c1              maskmovdqu xmm0, xmm1
0fc308                movnti [rax], ecx
"""

NASM_32 = """
a100100000            mov eax, [0x1000]
a200100000            mov [0x1000], al
8b04cb                mov eax, [ebx+ecx*8]
678b00                mov eax, [bx+si]
268b07                mov eax, [es:edi]
8b4500                mov eax, [ebp]
a30000e0fe            mov [0xfee00000], eax
c705ffffffff01000000  mov dword [0xffffffff], 1
8ed8                  mov ds, ax
668cd8                mov ax, ds
8c18                  mov [eax], ds
8e18                  mov ds, [eax]
0f20c0                mov eax, cr0
0f22c0                mov cr0, eax
40                    inc eax
6640                  inc ax
50                    push eax
6650                  push ax
0e                    push cs
1f                    pop ds
6a05                  push 5
6834120000            push 0x1234
66683412              push word 0x1234
6a05                  push dword 5
ff30                  push dword [eax]
60                    pusha
60                    pushad
9c                    pushf
9c                    pushfd
669c                  o16 pushf
6660                  pushaw
cf                    iret
cf                    iretd
66cf                  iretw
66cf                  o16 iret
c3                    ret
c20400                ret 4
9a001000000800        call 0x08:0x1000
ea001000000800        jmp 0x08:0x1000
ea001000000800        jmp dword 0x08:0x1000
66ea00100800          jmp word 0x08:0x1000
ff28                  jmp far [eax]
ff20                  jmp [eax]
66ff20                jmp word [eax]
ff10                  call dword [eax]
ebfe                  jmp $
67e3fd                jcxz $
e3fe                  jecxz $
e2fe                  loop $
0f0110                lgdt [eax]
660f0110              o16 lgdt [eax]
0f010500100000        sgdt [0x1000]
0f011d00100000        lidt [0x1000]
0f00d8                ltr ax
0f0010                lldt [eax]
c403                  les eax, [ebx]
0fb223                lss esp, [ebx]
6203                  bound eax, [ebx]
d40a                  aam
d40a                  aam 10
d50a                  aad
d6                    salc
90                    xchg eax, eax
c8080001              enter 8, 1
f3a5                  rep movsd
67a4                  a16 movsb
8b848ce8030000        mov eax, [esp+ecx*4+1000]
dd30                  fnsave [eax]
0f78c8                vmread eax, ecx
660f388201            invpcid eax, [ecx]
9bdfe0                fstsw ax
eb00                  jmp short $+2
"""

NASM_16 = """
a10010                mov ax, [0x1000]
a20010                mov [0x1000], al
8b1e0010              mov bx, [0x1000]
66a10010              mov eax, [0x1000]
8b00                  mov ax, [bx+si]
8b00                  mov ax, [si+bx]
8b4304                mov ax, [bp+di+4]
8b4600                mov ax, [bp]
8b47f0                mov ax, [bx-16]
8b873412              mov ax, [bx+0x1234]
66678b06              mov eax, [esi]
678b0448              mov ax, [eax+ecx*2]
67a145230100          mov ax, [dword 0x12345]
268a05                mov al, [es:di]
2e8807                mov [cs:bx], al
b83412                mov ax, 0x1234
66b878563412          mov eax, 0x12345678
8ed8                  mov ds, ax
8cd8                  mov ax, ds
8c1f                  mov [bx], ds
8e07                  mov es, [bx]
0f22c0                mov cr0, eax
0f20c0                mov eax, cr0
6683c801              or eax, 1
6650                  push eax
6a05                  push 5
683412                push 0x1234
666a05                push dword 5
666878563412          push dword 0x12345678
ff37                  push word [bx]
60                    pusha
6660                  pushad
9c                    pushf
669c                  pushfd
66cf                  iretd
c3                    ret
66c3                  o32 ret
cb                    retf
66cb                  o32 retf
9a10000010            call 0x1000:0x10
eaf0ff00f0            jmp 0xf000:0xfff0
66ea452301000800      jmp dword 0x08:0x12345
ff2f                  jmp far [bx]
66ff2f                jmp far dword [bx]
ff27                  jmp [bx]
ff17                  call word [bx]
ffe0                  jmp ax
ebfe                  jmp $
74fe                  je $
e3fe                  jcxz $
67e3fd                jecxz $
0f01160001            lgdt [0x100]
660f01160001          o32 lgdt [0x100]
c537                  lds si, [bx]
0fb227                lss sp, [bx]
f3a4                  rep movsb
fa                    cli
66ef                  out dx, eax
660fb6c0              movzx eax, al
66c1e004              shl eax, 4
830705                add word [bx], 5
6640                  inc eax
c8040000              enter 4, 0
6207                  bound ax, [bx]
dd37                  fnsave [bx]
"""

# No imm32 that is zero-extended by writing the 32-bit register: what is written is what is encoded.
# [rel number] is relative. The mode's own size for far pointers. Intel's and AT&T's spellings.
# AVX before AVX-512. A number as an address has the size that it needs.
OWN_64 = """
48c7c0ffffff7f        mov rax, 0x7fffffff
b8ffffffff            mov eax, 0xffffffff
48b8ffffffff00000000  mov rax, 0xffffffff
48c7c000000080        mov rax, 0xffffffff80000000
8b05fa0f0000          mov eax, [rel 0x1000]
c705f60f000078563412  mov dword [rel 0x1000], 0x12345678
ff28                  jmp far [rax]
480f07                sysretq
660f388201            invpcid rax, [rcx]
8b0458                mov eax, [rax*1+rbx*2]
8b00                  mov eax, dword ptr [rax]
658b00                mov eax, DWORD PTR gs:[rax]
8b0488                MOV EAX, [RAX + RCX * 4]
c60001                mov byte[rax], 1
c4e27150c2            vpdpbusd xmm0, xmm1, xmm2
"""

OWN_32 = """
ff2500100000          jmp [0x1000]
"""

OWN_16 = """
67a145230100          mov ax, [0x12345]
66f3a5                rep movsd
"""


def _rows(table: str) -> dict[str, str]:
    return {line: code for code, line in (row.split(None, 1) for row in table.strip().splitlines())}


@pytest.mark.parametrize(
    ("bits", "table"),
    [(64, NASM_64), (32, NASM_32), (16, NASM_16), (64, OWN_64), (32, OWN_32), (16, OWN_16)],
    ids=["64", "32", "16", "64-own", "32-own", "16-own"],
)
def test_encodings(bits: int, table: str) -> None:
    expected = _rows(table)
    assert {line: assemble(line, bits=bits).code.hex() for line in expected} == expected


@pytest.mark.parametrize("bits", [64, 32, 16])
def test_choice_does_not_depend_on_what_was_assembled_before(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Choices are kept by the operands' shapes; whichever line of a shape came first must not show."""
    expected = _rows({64: NASM_64, 32: NASM_32, 16: NASM_16}[bits])
    monkeypatch.setattr(instructions, "_choices", {})
    assert all(assemble(line, bits=bits).code.hex() == expected[line] for line in reversed(expected))


@pytest.mark.parametrize(("bits", "table"), [(64, NASM_64), (32, NASM_32), (16, NASM_16)])
def test_one_line_is_one_instruction(bits: int, table: str) -> None:
    for line in _rows(table):
        if line.startswith("f"):
            continue  # the waiting x87 instructions are two
        code = assemble(line, bits=bits).code
        instruction = Decoder(bits, code).decode()
        assert not instruction.is_invalid and instruction.len == len(code), line


REJECTED_64 = """
mov [rax], 1
add [rax], 5
inc [rax]
movzx eax, [rax]
push [rax]
shl [rax], cl
fld [rax]
mov eax, rbx
mov al, 256
mov eax, 0x100000000
add rax, 0xffffffff
add rax, 0x80000000
mov rax, 0x10000000000000000
int 256
in al, 256
mov eax, [rsp*2]
mov eax, [rax*3+rbx]
mov eax, [rax*16]
mov eax, [rax+ebx]
mov eax, [rax+rbx+rcx]
mov eax, [rax-rbx]
mov eax, [al]
mov eax, [bx]
mov eax, [rax+0x80000000]
mov eax, [~rax]
mov eax, [rax
mov eax, rax]
mov eax, []
mov eax, [ds]
mov eax, xs:[rax]
mov eax, [qword]
mov ecx, [0x1122334455667788]
mov ah, r8b
movzx r8d, ah
push eax
pusha
push ds
les eax, [rbx]
aam
jmp 8:0x1000
jmp eax
call ax
jmp short 0x1000
jcxz $
loop 0x1000
jmp far rax
jmp far $
lock jmp $
mov cs, [
xchg eax, eax
frobnicate eax
lock
rep
mov
mov eax
mov eax, ebx, ecx
mov eax,
mov eax, , ebx
mov eax, 5 6
mov eax, (5
mov eax, 5 +
mov eax, 0x
mov eax, 12h
mov eax, 1 / 0
mov eax, 1 << 999
mov eax, 'abc
mov eax, rax + 5
"""


@pytest.mark.parametrize("line", REJECTED_64.strip().splitlines())
def test_rejected(line: str) -> None:
    with pytest.raises(AssemblyError):
        assemble(line)


@pytest.mark.parametrize(
    ("bits", "line"),
    [(32, "mov rax, 1"), (32, "mov eax, [rel 5]"), (32, "syscall r8"), (32, "swapgs"), (32, "mov eax, r8d"),
     (16, "mov ax, [ax]"), (16, "mov ax, [bx+bp]"), (16, "mov ax, [bx*2]"), (16, "push 0x12345"),
     (16, "jmp word 8:0x12345"), (32, "jmp 0x12345:0"), (16, "mov ax, [bx+0x12345]")],
)  # fmt: skip
def test_rejected_in_other_modes(bits: int, line: str) -> None:
    with pytest.raises(AssemblyError):
        assemble(line, bits=bits)
