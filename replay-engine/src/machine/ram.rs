//! Guest RAM: bytes, which pages were written, and which hold decoded code.

/// Bytes of a page.
pub const PAGE: usize = 4096;

const DIRTY: u8 = 1;
const CODE: u8 = 2;
const WATCHED: u8 = 4;

/// RAM with page tracking. Addresses are offsets from its base.
#[derive(Clone, Debug)]
pub struct Ram {
    bytes: Vec<u8>,
    flags: Vec<u8>,
    /// Pages written since [`Ram::take_dirty`], each once.
    dirty: Vec<u32>,
    /// Pages whose decoded code a write has outdated, and watched ones that were written.
    stale_code: Vec<u32>,
}

impl Ram {
    /// `bytes` of zeros, a multiple of [`PAGE`].
    pub fn new(bytes: usize) -> Ram {
        assert!(bytes % PAGE == 0, "the manifest bounds memory to whole pages");
        Ram { bytes: vec![0; bytes], flags: vec![0; bytes / PAGE], dirty: vec![], stale_code: vec![] }
    }

    /// Its size.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Little-endian load of `N` bytes, `None` beyond the end.
    #[inline(always)]
    pub fn load<const N: usize>(&self, at: u64) -> Option<u64> {
        let at = usize::try_from(at).ok()?;
        let from = self.bytes.get(at..at.checked_add(N)?)?;
        let mut out = [0; 8];
        out[..N].copy_from_slice(from);
        Some(u64::from_le_bytes(out))
    }

    /// Little-endian store of `N` bytes, `None` beyond the end. May not cross a page.
    #[inline(always)]
    pub fn store<const N: usize>(&mut self, at: u64, value: u64) -> Option<()> {
        let at = usize::try_from(at).ok()?;
        let to = self.bytes.get_mut(at..at.checked_add(N)?)?;
        to.copy_from_slice(&value.to_le_bytes()[..N]);
        if self.flags[at / PAGE] != DIRTY {
            self.mark_written(at / PAGE);
        }
        Some(())
    }

    /// The same for a page that is known to be written and has no decoded code, which most
    /// stores go to; `false` if it is another, and nothing is done.
    #[inline(always)]
    pub fn store_written<const N: usize>(&mut self, at: u64, value: u64) -> bool {
        let at = at as usize;
        if self.flags.get(at / PAGE) != Some(&DIRTY) {
            return false;
        }
        match self.bytes.get_mut(at..at.wrapping_add(N)) {
            Some(to) => {
                to.copy_from_slice(&value.to_le_bytes()[..N]);
                true
            }
            None => false,
        }
    }

    #[cold]
    fn mark_written(&mut self, page: usize) {
        let flags = &mut self.flags[page];
        if *flags & DIRTY == 0 {
            self.dirty.push(page as u32);
        }
        if *flags & (CODE | WATCHED) != 0 {
            self.stale_code.push(page as u32);
        }
        *flags = *flags & WATCHED | DIRTY;
    }

    /// The bytes at `at`, `None` if any lies beyond the end.
    pub fn slice(&self, at: u64, len: usize) -> Option<&[u8]> {
        let at = usize::try_from(at).ok()?;
        self.bytes.get(at..at.checked_add(len)?)
    }

    /// Writes bytes, across pages if need be; `None` if any lies beyond the end.
    pub fn write(&mut self, at: u64, from: &[u8]) -> Option<()> {
        let at = usize::try_from(at).ok()?;
        self.bytes.get_mut(at..at.checked_add(from.len())?)?.copy_from_slice(from);
        if !from.is_empty() {
            for page in at / PAGE..=(at + from.len() - 1) / PAGE {
                if self.flags[page] != DIRTY {
                    self.mark_written(page);
                }
            }
        }
        Some(())
    }

    /// The bytes of a page.
    pub fn page(&self, page: u32) -> &[u8] {
        &self.bytes[page as usize * PAGE..][..PAGE]
    }

    /// Pages written since the last call.
    pub fn take_dirty(&mut self) -> Vec<u32> {
        for page in &self.dirty {
            self.flags[*page as usize] &= !DIRTY;
        }
        std::mem::take(&mut self.dirty)
    }

    /// Pages written since the last [`Ram::take_dirty`].
    pub fn dirty(&self) -> &[u32] {
        &self.dirty
    }

    /// Notes that a page has decoded code, so that a write to it is told.
    pub fn mark_code(&mut self, page: u32) {
        self.flags[page as usize] |= CODE;
    }

    /// Has every write to the page at `at` told, as if it had code.
    pub fn watch(&mut self, at: u64) {
        self.flags[at as usize / PAGE] |= WATCHED;
    }

    /// Whether decoded code was outdated since the last [`Ram::take_stale_code`].
    #[inline(always)]
    pub fn has_stale_code(&self) -> bool {
        !self.stale_code.is_empty()
    }

    /// Pages whose decoded code is outdated.
    pub fn take_stale_code(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.stale_code)
    }
}
