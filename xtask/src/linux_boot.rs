//! A shim that plays a monitor with the 64-bit Linux boot protocol. QEMU starts
//! it by PVH; it makes the state that OpenVMM or Firecracker makes and enters the
//! kernel as they do, at the address that its ELF header names.
//!
//! The low memory of such a machine (GDT, page tables, zero page, command line)
//! is made here, as a picture that the shim carries. What is only known in the
//! VM is added there from the PVH start info: the memory map, the command line
//! behind the monitor's own words, and the ACPI root pointer.

use anyhow::{Context, Result, ensure};
use object::{
    LittleEndian as LE,
    elf::{FileHeader64, PT_LOAD},
    read::elf::{FileHeader, ProgramHeader},
};

use crate::pvh::{self, Segment};

/// Whose state the kernel is entered in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Monitor {
    /// OpenVMM's: 4 GiB mapped, no stack; the ACPI root pointer is to be searched.
    OpenVmm,
    /// Firecracker's: 1 GiB mapped, a stack, the ACPI root pointer given.
    Firecracker,
}

/// What the kernel is given in RSI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Given {
    /// A whole zero page.
    ZeroPage,
    /// A zero page with an empty memory map.
    NoMemory,
    /// An address of nothing.
    Garbage,
}

/// An ELF that QEMU starts by PVH: the segments of `kernel`, and the shim that
/// enters it.
///
/// # Errors
/// When `kernel` is no 64-bit ELF, or no monitor could load it where it wants to be.
pub fn elf(kernel: &[u8], monitor: Monitor, given: Given) -> Result<Vec<u8>> {
    let state = match monitor {
        Monitor::OpenVmm => &OPENVMM,
        Monitor::Firecracker => &FIRECRACKER,
    };
    let (mut segments, kernel_entry) = load(kernel)?;
    let (shim, entry) = shim(state, given, kernel_entry);
    let end = shim.address + shim.size;
    ensure!(
        segments.iter().all(|segment| segment.address >= end),
        "the kernel wants to be below {end:#x}, where monitors put things of their own"
    );
    segments.push(shim);
    Ok(pvh::elf(&segments, entry))
}

/// A kernel's segments and its 64-bit entry.
fn load(kernel: &[u8]) -> Result<(Vec<Segment>, u32)> {
    let header = FileHeader64::<LE>::parse(kernel).context("the kernel is no ELF file")?;
    let endian = header
        .endian()
        .context("the kernel's ELF file is of the wrong kind")?;
    let segments = header
        .program_headers(endian, kernel)?
        .iter()
        .filter(|segment| segment.p_type(endian) == PT_LOAD)
        .map(|segment| {
            let bytes = segment
                .data(endian, kernel)
                .ok()
                .context("a segment of the kernel lies outside the file")?;
            Ok(Segment {
                address: segment.p_paddr(endian).try_into()?,
                bytes: bytes.to_vec(),
                size: segment.p_memsz(endian).try_into()?,
            })
        })
        .collect::<Result<_>>()?;
    Ok((segments, header.e_entry(endian).try_into()?))
}

/// The state in which a monitor enters a kernel.
struct State {
    gdt: u32,
    /// A word in place of the task state segment's descriptor, selector 0x18.
    tss: u64,
    /// Base and limit of the IDT.
    idt: (u32, u16),
    tables: u32,
    mapped_gib: u32,
    zero_page: u32,
    command_line: u32,
    /// Longest command line, with its terminator.
    command_line_max: u32,
    /// What the monitor itself puts on the command line.
    own_words: &'static str,
    kernel_alignment: u32,
    gives_rsdp: bool,
    efer: u32,
    cr0: u32,
    stack: u32,
}

/// OpenVMM: no IDT, no TSS and no stack.
const OPENVMM: State = State {
    gdt: 0x1000,
    tss: 0,
    idt: (0, 0),
    tables: 0x4000,
    mapped_gib: 4,
    zero_page: 0x2000,
    command_line: 0x3000,
    command_line_max: 0x1000,
    own_words: "panic=-1 rdinit=/bin/sh reboot=t ",
    kernel_alignment: 0x10_0000,
    gives_rsdp: false,
    efer: EFER_SCE | EFER_LME | EFER_NXE,
    cr0: CR0_PG | CR0_ET | CR0_PE,
    stack: 0,
};

/// Firecracker. CR0 is KVM's reset value, with caches off, and two bits more. An
/// available TSS stands here; that it is loaded makes it the busy one of Firecracker.
const FIRECRACKER: State = State {
    gdt: 0x500,
    tss: 0x008f_8900_0000_ffff,
    idt: (0x520, 7),
    tables: 0x9000,
    mapped_gib: 1,
    zero_page: 0x7000,
    command_line: 0x2_0000,
    command_line_max: 0x800,
    own_words: "reboot=k panic=1 nomodule 8250.nr_uarts=0 ",
    kernel_alignment: 0x100_0000,
    gives_rsdp: true,
    efer: EFER_LME,
    cr0: CR0_PG | CR0_CD | CR0_NW | CR0_ET | CR0_PE,
    stack: 0x8ff0,
};

const CR0_PE: u32 = 1;
const CR0_ET: u32 = 1 << 4;
const CR0_NW: u32 = 1 << 29;
const CR0_CD: u32 = 1 << 30;
const CR0_PG: u32 = 1 << 31;
const CR4_PAE: u32 = 1 << 5;
const EFER: u32 = 0xc000_0080;
const EFER_SCE: u32 = 1;
const EFER_LME: u32 = 1 << 8;
const EFER_NXE: u32 = 1 << 11;

const CODE_SELECTOR: u16 = 0x08;
const DATA_SELECTOR: u32 = 0x10;
const TSS_SELECTOR: u32 = 0x18;

/// Offsets in the zero page.
mod zero_page {
    pub(super) const RSDP: u32 = 0x070;
    pub(super) const E820_COUNT: u32 = 0x1e8;
    pub(super) const BOOT_FLAG: u32 = 0x1fe;
    pub(super) const HEADER: u32 = 0x202;
    pub(super) const LOADER: u32 = 0x210;
    pub(super) const COMMAND_LINE: u32 = 0x228;
    pub(super) const KERNEL_ALIGNMENT: u32 = 0x230;
    pub(super) const COMMAND_LINE_SIZE: u32 = 0x238;
    pub(super) const E820: u32 = 0x2d0;
}

/// Offsets in the PVH start info.
mod start_info {
    pub(super) const COMMAND_LINE: u8 = 24;
    pub(super) const RSDP: u8 = 32;
    pub(super) const MEMORY_MAP: u8 = 40;
    pub(super) const MEMORY_MAP_ENTRIES: u8 = 48;
}

/// Where the shim is loaded: above the first megabyte, below every kernel.
const BASE: u32 = 0x10_0000;

/// Mapped by neither monitor, and not even a canonical address.
const GARBAGE: u64 = 0xdead_beef_f00d_f00d;

/// The shim and its 32-bit entry.
fn shim(state: &State, given: Given, kernel_entry: u32) -> (Segment, u32) {
    let picture = picture(state);
    let low = picture.start;
    let in_picture = |address: u32| BASE + (address - low);
    let in_zero_page = |field: u32| in_picture(state.zero_page + field);

    // Behind the picture, the operands of `lgdt` and `lidt`; then the code.
    let mut bytes = picture.bytes;
    let picture_size = bytes.len() as u32;
    let gdt_pointer = BASE + picture_size;
    let idt_pointer = gdt_pointer + 6;
    for (base, limit) in [(state.gdt, GDT_SIZE - 1), state.idt] {
        bytes.extend(limit.to_le_bytes());
        bytes.extend(base.to_le_bytes());
    }
    let entry = BASE + bytes.len() as u32;
    let mut code = Code {
        start: entry,
        bytes: Vec::new(),
    };

    // 32-bit, no paging, flat segments; EBX is the start info.
    code.put(&[0xfa, 0xfc]); // cli; cld

    // The memory map: the entries of PVH are those of Linux and a word more.
    code.put(&[0x8b, 0x73, start_info::MEMORY_MAP]); // mov esi, [ebx + MEMORY_MAP]
    code.put(&[0x8b, 0x53, start_info::MEMORY_MAP_ENTRIES]); // mov edx, [ebx + ENTRIES]
    if given != Given::NoMemory {
        code.put32(&[0x88, 0x15], in_zero_page(zero_page::E820_COUNT)); // mov [E820_COUNT], dl
    }
    code.put32(&[0xbf], in_zero_page(zero_page::E820)); // mov edi, E820
    code.put32(&[0xb9], 5); // next: mov ecx, 5
    code.put(&[0xf3, 0xa5]); // rep movsd
    code.put(&[0x83, 0xc6, 0x04]); // add esi, 4
    code.put(&[0x4a, 0x75, 0xf3]); // dec edx; jnz next

    // The root pointer that the firmware's scan has found.
    if state.gives_rsdp {
        code.put(&[0x8b, 0x43, start_info::RSDP]); // mov eax, [ebx + RSDP]
        code.put32(&[0xa3], in_zero_page(zero_page::RSDP)); // mov [RSDP], eax
        code.put(&[0x8b, 0x43, start_info::RSDP + 4]); // mov eax, [ebx + RSDP + 4]
        code.put32(&[0xa3], in_zero_page(zero_page::RSDP + 4)); // mov [RSDP + 4], eax
    }

    // The command line, behind the monitor's own words, and its length.
    let line = in_picture(state.command_line);
    code.put(&[0x8b, 0x73, start_info::COMMAND_LINE]); // mov esi, [ebx + COMMAND_LINE]
    code.put32(&[0xbf], line + state.own_words.len() as u32); // mov edi, line + LENGTH
    code.put(&[0xac, 0xaa]); // next: lodsb; stosb
    code.put(&[0x84, 0xc0, 0x75, 0xfa]); // test al, al; jnz next
    code.put32(&[0x81, 0xef], line + 1); // sub edi, line + 1
    code.put32(&[0x89, 0x3d], in_zero_page(zero_page::COMMAND_LINE_SIZE)); // mov [SIZE], edi

    // Now nothing more is needed of the low memory as it was.
    code.put32(&[0xbe], BASE); // mov esi, BASE
    code.put32(&[0xbf], low); // mov edi, low
    code.put32(&[0xb9], picture_size / 4); // mov ecx, picture_size / 4
    code.put(&[0xf3, 0xa5]); // rep movsd

    // Descriptor tables, then long mode.
    code.put32(&[0x0f, 0x01, 0x15], gdt_pointer); // lgdt [gdt_pointer]
    code.put32(&[0x0f, 0x01, 0x1d], idt_pointer); // lidt [idt_pointer]
    if state.tss != 0 {
        code.put32(&[0xb8], TSS_SELECTOR); // mov eax, TSS_SELECTOR
        code.put(&[0x0f, 0x00, 0xd8]); // ltr ax
    }
    code.put32(&[0xb8], CR4_PAE); // mov eax, CR4_PAE
    code.put(&[0x0f, 0x22, 0xe0]); // mov cr4, eax
    code.put32(&[0xb8], state.tables); // mov eax, tables
    code.put(&[0x0f, 0x22, 0xd8]); // mov cr3, eax
    code.put32(&[0xb9], EFER); // mov ecx, EFER
    code.put32(&[0xb8], state.efer); // mov eax, efer
    code.put(&[0x31, 0xd2, 0x0f, 0x30]); // xor edx, edx; wrmsr
    code.put32(&[0xb8], state.cr0); // mov eax, cr0
    code.put(&[0x0f, 0x22, 0xc0]); // mov cr0, eax
    let next = code.here() + 7;
    code.put32(&[0xea], next); // jmp CODE_SELECTOR:next
    code.put(&CODE_SELECTOR.to_le_bytes());

    // 64-bit. The kernel is not to find a register of use but RSI.
    code.put32(&[0xb8], DATA_SELECTOR); // mov eax, DATA_SELECTOR
    code.put(&[0x8e, 0xd8, 0x8e, 0xc0]); // mov ds, eax; mov es, eax
    code.put(&[0x8e, 0xe0, 0x8e, 0xe8]); // mov fs, eax; mov gs, eax
    code.put(&[0x8e, 0xd0]); // mov ss, eax
    code.put(&[0x31, 0xc0]); // xor eax, eax: clears OF,
    code.put(&[0xb4, 0x02, 0x9e]); // mov ah, 2; sahf: and the other flags
    for move_to in [0xb8, 0xb9, 0xba, 0xbb, 0xbf] {
        code.put32(&[move_to], 0); // mov eax | ecx | edx | ebx | edi, 0
    }
    code.put32(&[0xbc], state.stack); // mov esp, stack
    code.put32(&[0xbd], state.stack); // mov ebp, stack
    let rsi = match given {
        Given::ZeroPage | Given::NoMemory => u64::from(state.zero_page),
        Given::Garbage => GARBAGE,
    };
    code.put(&[0x48, 0xbe]); // mov rsi, rsi
    code.put(&rsi.to_le_bytes());
    let next = code.here() + 5;
    code.put32(&[0xe9], kernel_entry.wrapping_sub(next)); // jmp kernel_entry

    bytes.extend(code.bytes);
    (Segment::new(BASE, bytes), entry)
}

/// Machine code in the making.
struct Code {
    start: u32,
    bytes: Vec<u8>,
}

impl Code {
    fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// An instruction that ends with a 32-bit operand.
    fn put32(&mut self, opcode: &[u8], operand: u32) {
        self.put(opcode);
        self.put(&operand.to_le_bytes());
    }

    /// Address of the next instruction.
    fn here(&self) -> u32 {
        self.start + self.bytes.len() as u32
    }
}

const PAGE: u32 = 0x1000;

/// Four descriptors.
const GDT_SIZE: u16 = 32;

/// A picture of low memory, from the monitor's first byte to its last.
struct Picture {
    start: u32,
    bytes: Vec<u8>,
}

impl Picture {
    fn put(&mut self, address: u32, bytes: &[u8]) {
        let at = (address - self.start) as usize;
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

fn picture(state: &State) -> Picture {
    let tables_end = state.tables + PAGE * (2 + state.mapped_gib);
    let end = tables_end.max(state.command_line + state.command_line_max);
    let mut picture = Picture {
        start: state.gdt,
        bytes: vec![0; (end - state.gdt) as usize],
    };
    // Nothing, 64-bit code, flat data, task state.
    let gdt = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, state.tss];
    for (index, descriptor) in (0..).zip(gdt) {
        picture.put(state.gdt + 8 * index, &descriptor.to_le_bytes());
    }

    // Tables of one level each, in order: present, writable; at last pages of 2 MiB.
    let mut entry = |address: u32, value: u32| {
        picture.put(address, &u64::from(value).to_le_bytes());
    };
    let [pml4, pdpt, directories] = [0, 1, 2].map(|level| state.tables + PAGE * level);
    entry(pml4, pdpt | 0x03);
    for gib in 0..state.mapped_gib {
        entry(pdpt + 8 * gib, (directories + PAGE * gib) | 0x03);
    }
    for page in 0..512 * state.mapped_gib {
        entry(directories + 8 * page, page << 21 | 0x83);
    }

    let mut field = |offset: u32, bytes: &[u8]| picture.put(state.zero_page + offset, bytes);
    field(zero_page::BOOT_FLAG, &0xaa55_u16.to_le_bytes());
    // Both leave the protocol version behind it zero.
    field(zero_page::HEADER, b"HdrS");
    field(zero_page::LOADER, &[0xff]);
    field(zero_page::COMMAND_LINE, &state.command_line.to_le_bytes());
    field(
        zero_page::KERNEL_ALIGNMENT,
        &state.kernel_alignment.to_le_bytes(),
    );
    picture.put(state.command_line, state.own_words.as_bytes());
    picture
}

#[cfg(test)]
mod tests {
    use object::{Object, ObjectSegment, read::elf::ElfFile64};

    use super::*;

    /// What the processor makes of an address by a picture's tables.
    fn translate(state: &State, picture: &Picture, address: u64) -> Option<u64> {
        let entry = |table: u64, index: u64| {
            let at = (table + 8 * (index & 511)) as usize - picture.start as usize;
            let entry = u64::from_le_bytes(picture.bytes[at..at + 8].try_into().unwrap());
            (entry & 1 == 1).then_some(entry)
        };
        let table = |entry: u64| entry & 0x000f_ffff_ffff_f000;
        let pml4e = entry(state.tables.into(), address >> 39)?;
        let pdpte = entry(table(pml4e), address >> 30)?;
        let pde = entry(table(pdpte), address >> 21)?;
        assert_eq!(pde & 0x80, 0x80, "pages are of 2 MiB");
        Some(table(pde) + (address & 0x1f_ffff))
    }

    #[test]
    fn so_much_is_mapped_at_its_own_address_and_no_more() {
        for (state, end) in [(&OPENVMM, 4 << 30), (&FIRECRACKER, 1 << 30)] {
            let picture = picture(state);
            for address in [0, 0x20_0000, 0x3fff_ffff, end - 1] {
                assert_eq!(translate(state, &picture, address), Some(address));
            }
            for address in [end, 1 << 39, u64::MAX - 0xfff] {
                assert_eq!(translate(state, &picture, address), None, "{address:#x}");
            }
        }
    }

    #[test]
    fn the_shim_goes_with_the_kernel_and_ends_in_a_jump_to_it() {
        let data = Segment {
            address: 0x20_0000,
            bytes: b"kernel".to_vec(),
            size: 0x3000,
        };
        let kernel = pvh::elf(&[data], 0x20_0002);
        for monitor in [Monitor::OpenVmm, Monitor::Firecracker] {
            let elf = elf(&kernel, monitor, Given::ZeroPage).unwrap();
            let file = ElfFile64::<object::Endianness>::parse(&*elf).unwrap();
            let segments: Vec<_> = file.segments().collect();
            assert_eq!(segments.len(), 2);
            assert_eq!(segments[0].address(), 0x20_0000);
            assert_eq!(segments[0].size(), 0x3000);
            assert_eq!(segments[0].data().unwrap(), b"kernel");
            let shim = segments[1].data().unwrap();
            let (code, distance) = shim.split_at(shim.len() - 4);
            assert_eq!(code.last(), Some(&0xe9));
            let distance = u32::from_le_bytes(distance.try_into().unwrap());
            let target = (BASE + shim.len() as u32).wrapping_add(distance);
            assert_eq!(target, 0x20_0002);
        }
    }

    #[test]
    fn a_kernel_in_the_monitors_place_is_refused() {
        let kernel = pvh::elf(&[Segment::new(BASE, b"kernel".to_vec())], BASE);
        assert!(elf(&kernel, Monitor::OpenVmm, Given::ZeroPage).is_err());
        assert!(elf(b"no ELF", Monitor::OpenVmm, Given::ZeroPage).is_err());
    }
}
