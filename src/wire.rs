//! Little-endian fields in byte buffers: the vocabulary that the log, the snapshots and the slot logs share.
//!
//! Writing cannot fail. Reading never panics: every short or malformed field is a [`Malformed`] that says which.

use crate::revision::Revision;

/// What a decoder could not make sense of.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub String);

/// Appends fields to a buffer.
pub trait Put {
    /// One byte.
    fn put_byte(&mut self, n: u8);
    /// Four bytes.
    fn put_u32(&mut self, n: u32);
    /// Eight bytes.
    fn put_u64(&mut self, n: u64);
    /// A u32 length, then the bytes.
    fn put_blob(&mut self, bytes: &[u8]);
    /// As [`Put::put_blob`].
    fn put_text(&mut self, text: &str) {
        self.put_blob(text.as_bytes());
    }
    /// Eight bytes.
    fn put_revision(&mut self, revision: Revision) {
        self.put_u64(revision.0);
    }
}

impl Put for Vec<u8> {
    fn put_byte(&mut self, n: u8) {
        self.push(n);
    }
    fn put_u32(&mut self, n: u32) {
        self.extend_from_slice(&n.to_le_bytes());
    }
    fn put_u64(&mut self, n: u64) {
        self.extend_from_slice(&n.to_le_bytes());
    }
    fn put_blob(&mut self, bytes: &[u8]) {
        let length = u32::try_from(bytes.len()).expect("every stored field is bounded far below 4 GiB");
        self.put_u32(length);
        self.extend_from_slice(bytes);
    }
}

/// Takes fields off the front of a buffer.
#[derive(Clone, Debug)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// The next `n` bytes.
    pub fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8], Malformed> {
        let (head, rest) = self
            .0
            .split_at_checked(n)
            .ok_or_else(|| Malformed(format!("{what} needs {n} bytes, {} are left", self.0.len())))?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Malformed> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    /// One byte.
    pub fn byte(&mut self, what: &str) -> Result<u8, Malformed> {
        Ok(self.array::<1>(what)?[0])
    }

    /// Four bytes.
    pub fn u32(&mut self, what: &str) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    /// Eight bytes.
    pub fn u64(&mut self, what: &str) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// Eight bytes.
    pub fn revision(&mut self, what: &str) -> Result<Revision, Malformed> {
        Ok(Revision(self.u64(what)?))
    }

    /// A u32 length, then the bytes.
    pub fn blob(&mut self, what: &str) -> Result<&'a [u8], Malformed> {
        let length = self.u32(what)?;
        self.take(length as usize, what)
    }

    /// As [`Reader::blob`], UTF-8.
    pub fn text(&mut self, what: &str) -> Result<&'a str, Malformed> {
        std::str::from_utf8(self.blob(what)?).map_err(|_| Malformed(format!("{what} is not UTF-8")))
    }

    /// Nothing may be left.
    pub fn end(&self, what: &str) -> Result<(), Malformed> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(Malformed(format!("{what} is followed by {} stray bytes", self.0.len())))
        }
    }
}
