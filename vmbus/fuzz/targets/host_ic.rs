//! libFuzzer's way into [`vmbus_fuzz::host_ic`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmbus_fuzz::host_ic(data));
