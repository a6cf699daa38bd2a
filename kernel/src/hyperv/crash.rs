//! Crash reports: what the kernel tells the host when it dies (TLFS, Partition Properties; spec
//! tlfs.md 9).
//!
//! Five numbers, and a text where the host takes one. Usable from a panic at any time: no
//! allocation, no lock, nothing that has to be handed in.

#![forbid(unsafe_code)]

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use super::features::{Features, Services};
use super::msr::{self, CrashControl};
use super::overlay::{PAGE_SIZE, Page, Published};

static OFFERED: AtomicBool = AtomicBool::new(false);
static REPORTED: AtomicBool = AtomicBool::new(false);
static PAGE: Published<Text> = Published::empty();
static PAGE_ADDRESS: AtomicU64 = AtomicU64::new(0);

type Text = [AtomicU8; PAGE_SIZE];

/// Gets ready to report. With `page` a report can carry a text. May be called early without a
/// page and again with one. No VM exit.
pub fn init(features: &Features, page: Option<Page>) {
    OFFERED.store(
        features.services.contains(Services::CRASH),
        Ordering::Relaxed,
    );
    if let Some(page) = page {
        let shared = page.share::<Text>();
        PAGE_ADDRESS.store(shared.address(), Ordering::Relaxed);
        PAGE.publish(shared.contents());
    }
}

/// Reports a crash to the host, once: later reports are left out, also those of other VPs. Returns
/// so that the caller can end the VM.
///
/// `parameters` go to P0 to P4: by custom P0 is the error code, P2 to P4 are RIP, RAX and RSP.
/// Where the host takes a text, P3 and P4 say where that is instead, and `text` is cut to 4096
/// bytes.
pub fn report(parameters: [u64; 5], text: &dyn fmt::Display) -> Reported {
    if !OFFERED.load(Ordering::Relaxed) {
        return Reported::NotOffered;
    }
    if REPORTED.load(Ordering::Relaxed) {
        return Reported::Already;
    }
    let supported = msr::CRASH_CTL.read();
    let mut parameters = parameters;
    let mut action = CrashControl::NOTIFY;
    let mut reported = Reported::Parameters;
    if supported.contains(CrashControl::MESSAGE)
        && let Some(page) = PAGE.get()
    {
        let length = write_text(page, text);
        if length > 0 {
            parameters[3] = PAGE_ADDRESS.load(Ordering::Relaxed);
            parameters[4] = length as u64;
            action = action.and(CrashControl::MESSAGE);
            reported = Reported::Text;
        }
    }
    // Not before: if printing the text panics, the second report goes out.
    if REPORTED.swap(true, Ordering::Relaxed) {
        return Reported::Already;
    }
    let [p0, p1, p2, p3, p4] = parameters;
    msr::CRASH_P0.write(p0);
    msr::CRASH_P1.write(p1);
    msr::CRASH_P2.write(p2);
    msr::CRASH_P3.write(p3);
    msr::CRASH_P4.write(p4);
    msr::CRASH_CTL.write(action);
    reported
}

/// What became of a report.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reported {
    /// The host takes no reports.
    NotOffered,
    /// There was a report before.
    Already,
    /// The host has the five parameters.
    Parameters,
    /// The host has the text, and parameters 0 to 2.
    Text,
}

/// Writes `text` to `page`, as far as it fits, and returns its length.
fn write_text(page: &Text, text: &dyn fmt::Display) -> usize {
    let mut writer = Writer { page, length: 0 };
    // The only error is "full", and what is there by then is worth having.
    let _ = write!(writer, "{text}");
    writer.length
}

struct Writer<'a> {
    page: &'a Text,
    length: usize,
}

impl Write for Writer<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.page.get(self.length..).unwrap_or_default();
        let fits = text.floor_char_boundary(room.len());
        for (target, byte) in room.iter().zip(text.bytes().take(fits)) {
            target.store(byte, Ordering::Relaxed);
        }
        self.length += fits;
        if fits == text.len() {
            Ok(())
        } else {
            Err(fmt::Error)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::string::String;
    use std::vec::Vec;

    use super::*;

    fn written(text: &dyn fmt::Display) -> String {
        let page: Text = [const { AtomicU8::new(0) }; PAGE_SIZE];
        let length = write_text(&page, text);
        let bytes: Vec<_> = page[..length]
            .iter()
            .map(|byte| byte.load(Ordering::Relaxed))
            .collect();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn text_is_written_as_it_is() {
        assert_eq!(
            written(&format_args!("page fault at {:#x}", 16)),
            "page fault at 0x10"
        );
        assert_eq!(written(&""), "");
    }

    #[test]
    fn long_text_is_cut_between_characters() {
        let long = "a".repeat(4095) + "\u{e9}tail";
        assert_eq!(written(&long), "a".repeat(4095));
        let in_parts = format_args!("{}{}{}", "b".repeat(4000), "c".repeat(96), "d").to_string();
        assert_eq!(written(&in_parts), "b".repeat(4000) + &"c".repeat(96));
    }

    #[test]
    fn nothing_is_reported_where_nothing_is_offered() {
        assert_eq!(report([0; 5], &"crash"), Reported::NotOffered);
    }
}
