//! What a debugger looks for: asked before every instruction, once its interrupt is taken.
//!
//! A lookout sees and may hold the run; it changes nothing. It is no state.

use super::hart::Hart;

/// Which accesses are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessKind {
    /// Loads.
    Read,
    /// Stores.
    Write,
    /// Both.
    Any,
}

/// Memory that is watched, by virtual address. What devices write is not seen; an access
/// that faults is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watchpoint {
    /// Where it begins.
    pub address: u64,
    /// How long it is.
    pub bytes: u64,
    /// What is looked for.
    pub kind: AccessKind,
}

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// The next instruction is at a breakpoint.
    Breakpoint,
    /// An instruction that accesses what is watched.
    Watchpoint(Watchpoint),
}

/// What is to be done about what is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Search {
    /// Hold before the first: a breakpoint behind this icount, a watchpoint also at it.
    First(u64),
    /// Hold nowhere, and note the last.
    Last,
    /// Hold before any instruction.
    Here,
}

/// A search under way.
#[derive(Clone, Debug)]
pub(crate) struct Lookout {
    search: Search,
    /// Ascending.
    breakpoints: Vec<u64>,
    watchpoints: Vec<Watchpoint>,
    /// What the other harts do is not looked at.
    only: Option<usize>,
    is_holding: bool,
    found: Option<(u64, Found)>,
}

impl Lookout {
    pub(crate) fn new(
        search: Search,
        breakpoints: Vec<u64>,
        watchpoints: Vec<Watchpoint>,
        only: Option<usize>,
    ) -> Lookout {
        Lookout { search, breakpoints, watchpoints, only, is_holding: false, found: None }
    }

    /// Whether the run was ended before the instruction at pc.
    pub(crate) fn is_holding(&self) -> bool {
        self.is_holding
    }

    /// Where to stop for what was found, and what it was. Forwards that is before the
    /// instruction. Backwards one comes from the other side: an access is met behind it.
    pub(crate) fn found(&self) -> Option<(u64, Found)> {
        self.found
    }

    /// Whether [`Lookout::look`] wants the instruction's bits.
    pub(super) fn reads_code(&self) -> bool {
        !self.watchpoints.is_empty()
    }

    /// The instruction at pc is the next one, by the hart of this number; whether to hold
    /// before it.
    pub(super) fn look(&mut self, icount: u64, number: usize, hart: &Hart, bits: Option<u32>) -> bool {
        let is_meant = self.only.is_none_or(|only| only == number);
        let is_breakpoint = is_meant && self.breakpoints.binary_search(&hart.pc).is_ok();
        let access = bits.filter(|_| is_meant).and_then(|bits| Access::of(bits, &hart.x[..]));
        let watched = access.and_then(|access| self.watchpoints.iter().find(|w| access.touches(w)));
        match self.search {
            Search::Here => self.is_holding = true,
            Search::First(from) if is_breakpoint && icount > from => {
                self.found = Some((icount, Found::Breakpoint));
                self.is_holding = true;
            }
            Search::First(_) => {
                if let Some(watchpoint) = watched {
                    self.found = Some((icount, Found::Watchpoint(*watchpoint)));
                    self.is_holding = true;
                }
            }
            Search::Last => {
                if is_breakpoint {
                    self.found = Some((icount, Found::Breakpoint));
                }
                if let Some(watchpoint) = watched {
                    self.found = Some((icount + 1, Found::Watchpoint(*watchpoint)));
                }
            }
        }
        self.is_holding
    }
}

/// What an instruction is about to access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Access {
    address: u64,
    bytes: u64,
    kind: AccessKind,
}

impl Access {
    /// From the instruction's bits, and not from how it was decoded: floating-point loads
    /// and stores are accesses whether this machine has them or not.
    fn of(bits: u32, x: &[u64]) -> Option<Access> {
        if bits & 3 == 3 { Access::of_word(bits, x) } else { Access::of_compressed(bits, x) }
    }

    fn of_word(bits: u32, x: &[u64]) -> Option<Access> {
        let base = x[(bits >> 15 & 31) as usize];
        let bytes = 1 << (bits >> 12 & 3);
        let load_offset = (bits as i32 >> 20) as i64 as u64;
        let store_offset = ((bits as i32 >> 25 << 5) | (bits >> 7 & 31) as i32) as i64 as u64;
        let (offset, kind) = match bits & 0x7f {
            0x03 | 0x07 => (load_offset, AccessKind::Read),
            0x23 | 0x27 => (store_offset, AccessKind::Write),
            0x2f => match bits >> 27 {
                0x02 => (0, AccessKind::Read),
                0x03 => (0, AccessKind::Write),
                _ => (0, AccessKind::Any),
            },
            _ => return None,
        };
        Some(Access { address: base.wrapping_add(offset), bytes, kind })
    }

    fn of_compressed(bits: u32, x: &[u64]) -> Option<Access> {
        // Bits `from..from + count` of the instruction, at `to` in the offset.
        let field = |from: u32, count: u32, to: u32| u64::from(bits >> from & ((1 << count) - 1)) << to;
        let (is_stack, function) = (bits & 3 == 2, bits >> 13 & 7);
        if bits & 3 == 1 {
            return None;
        }
        let (offset, bytes) = match (is_stack, function) {
            (false, 2 | 6) => (field(10, 3, 3) | field(6, 1, 2) | field(5, 1, 6), 4),
            (false, 1 | 3 | 5 | 7) => (field(10, 3, 3) | field(5, 2, 6), 8),
            (true, 2) => (field(12, 1, 5) | field(4, 3, 2) | field(2, 2, 6), 4),
            (true, 1 | 3) => (field(12, 1, 5) | field(5, 2, 3) | field(2, 3, 6), 8),
            (true, 6) => (field(9, 4, 2) | field(7, 2, 6), 4),
            (true, 5 | 7) => (field(10, 3, 3) | field(7, 3, 6), 8),
            _ => return None,
        };
        let base = if is_stack { x[2] } else { x[8 + (bits >> 7 & 7) as usize] };
        let kind = if function < 4 { AccessKind::Read } else { AccessKind::Write };
        Some(Access { address: base.wrapping_add(offset), bytes, kind })
    }

    fn touches(&self, watchpoint: &Watchpoint) -> bool {
        let overlaps = watchpoint.address.wrapping_sub(self.address) < self.bytes
            || self.address.wrapping_sub(watchpoint.address) < watchpoint.bytes;
        let is_wanted = self.kind == watchpoint.kind
            || self.kind == AccessKind::Any
            || watchpoint.kind == AccessKind::Any;
        overlaps && is_wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_access_is_read_from_its_bits() {
        let x: Vec<u64> = (0..64).map(|n| n * 0x1000).collect();
        let cases: [(u32, Option<(u64, u64, AccessKind)>); 14] = [
            (0xff85_3783, Some((0xa000 - 8, 8, AccessKind::Read))), // ld a5, -8(a0)
            (0x0005_4783, Some((0xa000, 1, AccessKind::Read))),     // lbu a5, 0(a0)
            (0xfef5_2e23, Some((0xa000 - 4, 4, AccessKind::Write))), // sw a5, -4(a0)
            (0x0085_3507, Some((0xa008, 8, AccessKind::Read))),     // fld fa0, 8(a0)
            (0x00a5_2827, Some((0xa010, 4, AccessKind::Write))),    // fsw fa0, 16(a0)
            (0x1005_27af, Some((0xa000, 4, AccessKind::Read))),     // lr.w a5, (a0)
            (0x18f5_27af, Some((0xa000, 4, AccessKind::Write))),    // sc.w a5, a5, (a0)
            (0x00f5_37af, Some((0xa000, 8, AccessKind::Any))),      // amoadd.d a5, a5, (a0)
            (0x651c, Some((0xa008, 8, AccessKind::Read))),          // c.ld a5, 8(a0)
            (0xc15c, Some((0xa004, 4, AccessKind::Write))),         // c.sw a5, 4(a0)
            (0x67a2, Some((0x2008, 8, AccessKind::Read))),          // c.ldsp a5, 8(sp)
            (0xe43e, Some((0x2008, 8, AccessKind::Write))),         // c.sdsp a5, 8(sp)
            (0x0505, None),                                         // c.addi a0, 1
            (0x00a5_0533, None),                                    // add a0, a0, a0
        ];
        for (bits, expected) in cases {
            let found = Access::of(bits, &x).map(|access| (access.address, access.bytes, access.kind));
            assert_eq!(found, expected, "{bits:#x}");
        }
    }
}
