//! A small ELF, written field by field: an architectural test, with the symbols by which it
//! ends and says where its results lie. The bundled guest has no symbols.

const HEAD_BYTES: u64 = 64;
const SEGMENT_BYTES: u64 = 56;
const SYMBOL_BYTES: u64 = 24;
const SECTION_BYTES: u64 = 64;

/// Ends well: stores 1 to `tohost`.
const CODE: [u32; 4] = [
    0x0000_1297, // auipc t0, 1
    0x0010_0313, // li    t1, 1
    0x0062_b023, // sd    t1, 0(t0)
    0x0000_006f, // j     .
];
/// How far behind the code's beginning they are.
const SYMBOLS: [(&str, u64); 4] =
    [("tohost", 0x1000), ("fromhost", 0x1040), ("begin_signature", 0x1080), ("end_signature", 0x10a0)];
/// What its segment takes in memory; the file has the code alone.
const MEMORY_BYTES: u64 = 0x2000;

/// Numbers, each in so many bytes.
fn fields(numbers: &[(u64, usize)]) -> Vec<u8> {
    numbers.iter().flat_map(|(number, bytes)| number.to_le_bytes()[..*bytes].to_vec()).collect()
}

fn section(kind: u64, at: u64, bytes: usize, link: u64, entry_bytes: u64) -> Vec<u8> {
    let place: [(u64, usize); 6] = [(0, 4), (kind, 4), (0, 8), (0, 8), (at, 8), (bytes as u64, 8)];
    // One symbol is local: the first, which is none.
    fields(&[&place[..], &[(link, 4), (u64::from(link != 0), 4), (8, 8), (entry_bytes, 8)]].concat())
}

/// The test, to be loaded at `at`.
pub(super) fn test_at(at: u64) -> Vec<u8> {
    let code: Vec<u8> = CODE.iter().flat_map(|word| word.to_le_bytes()).collect();
    let (mut symbols, mut names) = (vec![0_u8; SYMBOL_BYTES as usize], vec![0_u8]);
    for (name, offset) in SYMBOLS {
        // Global, an object, and absolute.
        let symbol = [(names.len() as u64, 4), (0x11, 1), (0, 1), (0xfff1, 2), (at + offset, 8), (0, 8)];
        symbols.extend(fields(&symbol));
        names.extend_from_slice(name.as_bytes());
        names.push(0);
    }
    let code_at = HEAD_BYTES + SEGMENT_BYTES;
    let symbols_at = code_at + code.len() as u64;
    let names_at = symbols_at + symbols.len() as u64;
    let sections_at = names_at + names.len() as u64;
    let sections = [
        section(0, 0, 0, 0, 0),
        section(2, symbols_at, symbols.len(), 2, SYMBOL_BYTES),
        section(3, names_at, names.len(), 0, 0),
    ];
    let head = [
        // An executable for RISC-V.
        fields(&[(2, 2), (243, 2), (1, 4), (at, 8), (HEAD_BYTES, 8), (sections_at, 8), (0, 4)]),
        fields(&[(HEAD_BYTES, 2), (SEGMENT_BYTES, 2), (1, 2), (SECTION_BYTES, 2), (3, 2), (0, 2)]),
    ];
    let bytes = code.len() as u64;
    let segment = [(1, 4), (7, 4), (code_at, 8), (at, 8), (at, 8), (bytes, 8), (MEMORY_BYTES, 8), (8, 8)];
    // 64-bit and little-endian.
    let ident = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    [ident, head.concat(), fields(&segment), code, symbols, names, sections.concat()].concat()
}
