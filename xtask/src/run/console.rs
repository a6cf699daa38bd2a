//! The guest's console on standard output, with symbols below report lines; and standard
//! input on the guest's console.

use std::{
    io::{self, PipeWriter, Read, Write},
    thread,
};

use crate::guest::Symboliser;

/// The console.
pub struct Console<'a> {
    symboliser: &'a Symboliser,
    line: Vec<u8>,
}

impl<'a> Console<'a> {
    /// An empty one.
    pub fn new(symboliser: &'a Symboliser) -> Self {
        Self {
            symboliser,
            line: Vec::new(),
        }
    }

    /// Shows bytes at once; a line's symbols follow its end.
    pub fn show(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut out = io::stdout().lock();
        for &byte in bytes {
            out.write_all(&[byte])?;
            if byte == b'\n' {
                let line = String::from_utf8_lossy(&self.line);
                for below in self.symboliser.below(&line) {
                    writeln!(out, "{below}")?;
                }
                self.line.clear();
            } else {
                self.line.push(byte);
            }
        }
        out.flush()
    }

    /// Ends a line that the guest left open.
    pub fn end(&mut self) -> io::Result<()> {
        if self.line.is_empty() {
            Ok(())
        } else {
            self.show(b"\n")
        }
    }
}

/// Types at the guest's console what comes on standard input, until either ends.
pub fn type_input(mut console: PipeWriter) {
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        let mut input = io::stdin().lock();
        loop {
            match input.read(&mut bytes) {
                Ok(length @ 1..) => {
                    let piece = bytes.get(..length).unwrap_or_default();
                    if console.write_all(piece).is_err() {
                        return; // The VM has ended.
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => return,
            }
        }
    });
}
