//! libFuzzer's way into [`vmbus_fuzz::kmcl_channel`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmbus_fuzz::kmcl_channel(data));
