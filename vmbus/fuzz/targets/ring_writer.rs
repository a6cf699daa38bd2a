//! libFuzzer's way into [`vmbus_fuzz::ring_writer`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmbus_fuzz::ring_writer(data));
