//! libFuzzer's way into [`vmbus_fuzz::host_hvsocket`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmbus_fuzz::host_hvsocket(data));
