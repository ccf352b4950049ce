//! Guest RAM: bytes, which pages were written, and which hold decoded code.

use zerocopy::FromZeros;

/// Bytes of a page.
pub const PAGE: usize = 4096;

const DIRTY: u8 = 1;
const CODE: u8 = 2;
const WATCHED: u8 = 4;
/// Written since there is this RAM; what is not is zero.
const USED: u8 = 8;
/// What a page is that takes any store: see [`Ram::takes_any_store`].
const PLAIN: u8 = DIRTY | USED;

/// RAM with page tracking. Addresses are offsets from its base.
#[derive(Clone, Debug)]
pub struct Ram {
    pages: Vec<[u8; PAGE]>,
    flags: Vec<u8>,
    /// Pages written since [`Ram::take_dirty`], each once.
    dirty: Vec<u32>,
    /// Pages whose decoded code a write has outdated, and watched ones that were written.
    stale_code: Vec<u32>,
}

impl Ram {
    /// `bytes` of zeros, a multiple of [`PAGE`], for checks: panics where the host has no room.
    pub fn new(bytes: usize) -> Ram {
        Ram::allocate(bytes).unwrap_or_else(|| panic!("no {bytes} bytes of memory for a guest's RAM"))
    }

    /// The same; none, if the host does not give so much. Pages cost nothing until they are
    /// touched: a vector of copies of a page would touch them all.
    pub fn allocate(bytes: usize) -> Option<Ram> {
        assert!(bytes % PAGE == 0, "the manifest bounds memory to whole pages");
        let pages = <[u8; PAGE]>::new_vec_zeroed(bytes / PAGE).ok()?;
        Some(Ram { flags: vec![0; pages.len()], pages, dirty: vec![], stale_code: vec![] })
    }

    /// Its size.
    pub fn len(&self) -> usize {
        self.pages.len() * PAGE
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Little-endian load of `N` bytes, `None` beyond the end.
    #[inline(always)]
    pub fn load<const N: usize>(&self, at: u64) -> Option<u64> {
        Some(value(self.slice(at, N)?.first_chunk::<N>()?))
    }

    /// The same of aligned bytes of a page, by its number.
    #[inline(always)]
    pub(super) fn load_in<const N: usize>(&self, page: usize, va: u64) -> Option<u64> {
        let bytes = &self.pages.get(page)?[(va as usize % PAGE) & !(N - 1)..];
        Some(value(bytes.first_chunk::<N>()?))
    }

    /// Little-endian store of `N` bytes, `None` beyond the end. May not cross a page.
    #[inline(always)]
    pub fn store<const N: usize>(&mut self, at: u64, value: u64) -> Option<()> {
        let at = usize::try_from(at).ok()?;
        let to = self.pages.get_mut(at / PAGE)?.get_mut(at % PAGE..at % PAGE + N)?;
        *to.first_chunk_mut::<N>()? = *value.to_le_bytes().first_chunk::<N>()?;
        if self.flags[at / PAGE] != PLAIN {
            self.mark_written(at / PAGE);
        }
        Some(())
    }

    /// Stores aligned bytes in a page, by its number, which [`Ram::takes_any_store`].
    #[inline(always)]
    pub(super) fn store_in<const N: usize>(&mut self, page: usize, va: u64, value: u64) -> bool {
        let to = self.pages.get_mut(page).map(|page| &mut page[(va as usize % PAGE) & !(N - 1)..]);
        match (to.and_then(|to| to.first_chunk_mut::<N>()), value.to_le_bytes().first_chunk::<N>()) {
            (Some(to), Some(from)) => {
                *to = *from;
                true
            }
            _ => false,
        }
    }

    /// Whether nobody is to be told of a store to a page: it is known to be written, has no
    /// decoded code, and is not watched. Until [`Ram::take_dirty`], [`Ram::mark_code`] or
    /// [`Ram::watch`].
    pub(super) fn takes_any_store(&self, page: usize) -> bool {
        self.flags.get(page) == Some(&PLAIN)
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
        *flags = *flags & WATCHED | PLAIN;
    }

    /// The bytes at `at`, `None` if any lies beyond the end.
    pub fn slice(&self, at: u64, len: usize) -> Option<&[u8]> {
        let at = usize::try_from(at).ok()?;
        self.pages.as_flattened().get(at..at.checked_add(len)?)
    }

    /// Writes bytes, across pages if need be; `None` if any lies beyond the end.
    pub fn write(&mut self, at: u64, from: &[u8]) -> Option<()> {
        let at = usize::try_from(at).ok()?;
        let to = self.pages.as_flattened_mut().get_mut(at..at.checked_add(from.len())?)?;
        to.copy_from_slice(from);
        if !from.is_empty() {
            for page in at / PAGE..=(at + from.len() - 1) / PAGE {
                if self.flags[page] != PLAIN {
                    self.mark_written(page);
                }
            }
        }
        Some(())
    }

    /// The bytes of a page.
    pub fn page(&self, page: u32) -> &[u8] {
        &self.pages[page as usize]
    }

    /// Pages written since the last call.
    pub(super) fn take_dirty(&mut self) -> Vec<u32> {
        for page in &self.dirty {
            self.flags[*page as usize] &= !DIRTY;
        }
        std::mem::take(&mut self.dirty)
    }

    /// Pages that were ever written: all others are zero.
    pub(crate) fn used(&self) -> impl Iterator<Item = u32> {
        (0u32..).zip(&self.flags).filter(|(_, flags)| **flags & USED != 0).map(|(page, _)| page)
    }

    /// Pages written since the last [`Ram::take_dirty`].
    pub fn dirty(&self) -> &[u32] {
        &self.dirty
    }

    /// Notes that a page has decoded code, so that a write to it is told; whether that is new.
    pub(super) fn mark_code(&mut self, page: u32) -> bool {
        let flags = &mut self.flags[page as usize];
        let is_new = *flags & CODE == 0;
        *flags |= CODE;
        is_new
    }

    /// Has every write to the page at `at` told, as if it had code.
    pub(super) fn watch(&mut self, at: u64) {
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

fn value<const N: usize>(bytes: &[u8; N]) -> u64 {
    let mut wide = [0; 8];
    for (to, from) in wide.iter_mut().zip(bytes) {
        *to = *from;
    }
    u64::from_le_bytes(wide)
}
